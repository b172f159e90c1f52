"""All-linear leaves routers alone, and the plan says how far the adapter reaches."""

from __future__ import annotations

import pytest

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import reach
from lora_trainer.model.adapter import add_adapter
from lora_trainer.model.compat import MAJOR
from support.families import tiny_model
from support.mixture import MIXTURES, mixture


def parameters(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)


def adapted(model) -> set[str]:
    return {n.replace(".base_layer", "") for n, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_leaves_routers_alone(name):
    model = mixture(name)
    routers = set(reach.routers(model))
    assert routers
    count = MIXTURES[name].get("num_experts") or MIXTURES[name]["num_local_experts"]
    assert {reach._outputs(model.get_submodule(one)) for one in routers} <= {count, 1}
    names = adapted(add_adapter(model, LoraSection(lora_r=4), seed=1))
    assert not {one for one in names if any(one.endswith(router) for router in routers)}
    assert any(one.endswith("o_proj") or one.endswith("kv_proj") for one in names)


def test_a_dense_model_has_no_router_and_needs_no_note():
    model = tiny_model("llama")
    assert reach.routers(model) == {}
    peft_model = add_adapter(model, LoraSection(lora_r=4), seed=1)
    assert reach.notes(peft_model, parameters(model), LoraSection()) == ()
    assert peft_model.peft_config["default"].exclude_modules is None


def test_the_plan_says_what_is_left_out_and_what_is_reached():
    model = add_adapter(mixture("Phimoe"), LoraSection(lora_r=4), seed=1)
    base = parameters(model)
    (note,) = reach.notes(model, base, LoraSection())
    assert "routers (" in note
    assert ("experts fused in one tensor" in note) is (MAJOR >= 5)
    linear = [m for m in model.modules() if hasattr(m, "lora_A")]
    share = 100 * sum(m.in_features * m.out_features for m in linear) / base
    assert note.startswith(f"the adapter reaches {share:.0f}% of the parameters, and leaves out")


def test_a_router_that_is_named_is_adapted_with_a_warning():
    router = next(iter(reach.routers(mixture("Phimoe")))).rsplit(".", 1)[-1]
    section = LoraSection(lora_r=4, lora_target_modules=["q_proj", router])
    model = add_adapter(mixture("Phimoe"), section, seed=1)
    assert any(name.endswith(f".{router}") for name in adapted(model))
    note = reach.notes(model, parameters(model), section)[-1]
    assert note.startswith("the adapter changes routers (")
    assert router in note


def test_the_endings_name_nothing_else():
    names = ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    assert reach.shortest(names, ["layers.0.mlp.up_proj"]) == ["gate"]
    assert reach.shortest(names, ["layers.0.attention.gate"]) == ["mlp.gate"]
