"""Adapters of every kind load on the untouched base model with plain PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from lora_trainer.config.schema import LoraSection
from lora_trainer.data.prompt_format import PromptFormat
from lora_trainer.errors import ConfigError
from lora_trainer.model.adapter import (
    adapter_state,
    add_adapter,
    changes_base,
    load_adapter_state,
    trainable_parameters,
)
from lora_trainer.report.model_card import CardFacts
from lora_trainer.train import export
from lora_trainer.train import initial as initials
from support.families import VOCABULARY, tiny_model


class NoTokenizer:
    """A tokenizer without files."""

    eos_token_id = pad_token_id = chat_template = None

    def save_pretrained(self, folder):
        """Write nothing."""


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "named": {"lora_target_modules": ["q_proj", "v_proj"]},
    "pattern": {"lora_target_modules": ".*(q|v)_proj"},
    "comma": {"lora_target_modules": "q_proj,v_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "full head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_gives_the_trained_logits_on_the_plain_base(kind, tmp_path):
    section = LoraSection(lora_r=4, lora_alpha=8, **KINDS[kind])
    model = add_adapter(tiny_model("llama"), section, seed=3)
    initial = initials.save(model, tmp_path / "initial") if changes_base(section) else None
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(VOCABULARY, (1, 12))
    model.eval()
    trained = model(input_ids=ids).logits
    facts = CardFacts(run_name="t", base_model="tiny")
    asked = PromptFormat("text", ())
    folder = export.export(model, NoTokenizer(), tmp_path, facts, asked, initial)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "prompt_format.json",
    }
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(folder)).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=1e-3, atol=1e-3)


def test_the_first_weights_depend_on_the_seed_alone():
    section = LoraSection(lora_r=4)
    states = []
    for noise in (1, 2):
        model = tiny_model("llama")
        torch.rand(noise)
        states.append(adapter_state(add_adapter(model, section, seed=9)))
    for name, weights in states[0].items():
        assert torch.equal(weights, states[1][name])


def test_an_adapter_state_goes_back_in_place():
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=0)
    before = adapter_state(model)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1)
    load_adapter_state(model, before)
    after = adapter_state(model)
    assert all(torch.equal(after[name], weights) for name, weights in before.items())


def test_a_state_of_another_rank_is_refused():
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=0)
    other = add_adapter(tiny_model("llama"), LoraSection(lora_r=8), seed=0)
    with pytest.raises(ValueError, match="shape"):
        load_adapter_state(model, adapter_state(other))


def test_a_module_that_is_not_there_is_refused_with_those_that_are():
    section = LoraSection(lora_target_modules=["q_proj", "c_attn"])
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("llama"), section, seed=0)
    (problem,) = caught.value.problems
    assert "c_attn" in problem.what
    assert "k_proj" in problem.why


def adapted(model):
    return {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }


def test_a_regular_expression_adapts_what_it_matches_as_a_whole():
    section = LoraSection(lora_target_modules=r".*\.(q|v)_proj")
    model = add_adapter(tiny_model("llama"), section, seed=0)
    assert adapted(model) == {"q_proj", "v_proj"}


def refusal(**keys):
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("llama"), LoraSection(**keys), seed=0)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (".*(q|v_proj", "not a valid regular expression"),
        ("(q|v)_proj", "matches no module"),
        (["input_layernorm"], "PEFT cannot"),
        (".*layernorm", "PEFT cannot"),
        (["mlp"], "PEFT cannot"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets, what):
    problem = refusal(lora_target_modules=targets)
    assert what in problem.what
    assert problem.why
    assert "\n" not in problem.why
    assert "q_proj" in problem.remedy


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_beyond_a_decomposed_weight_is_refused_with_the_largest_one(init):
    problem = refusal(init_lora_weights=init, lora_r=17)
    assert problem.remedy == "--lora_r 16"  # k_proj is 32 x 16
    assert "k_proj" in problem.why


def test_the_largest_rank_of_a_decomposed_weight_is_taken():
    section = LoraSection(init_lora_weights="pissa", lora_r=32, lora_target_modules="q_proj")
    assert adapted(add_adapter(tiny_model("llama"), section, seed=0)) == {"q_proj"}
