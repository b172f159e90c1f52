"""Mixtures of experts are trained as plain transformers and PEFT train them, routers frozen."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from lora_trainer.config.schema import LoraSection, ModelSection
from lora_trainer.errors import ConfigError
from lora_trainer.model import quantize, reach
from lora_trainer.model.adapter import adapter_state, add_adapter, trainable_parameters
from lora_trainer.model.compat import MAJOR, enable_checkpointing
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import verify
from lora_trainer.train.export import save_adapter
from lora_trainer.train.finite import _as_base
from support.families import MIXTURES, tiny_model
from support.mixture import mixture
from support.plain_peft import make_rows, ours, plain

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
fused = pytest.mark.skipif(MAJOR < 5, reason="transformers 4.50 holds experts as linear layers")


def section(**own) -> LoraSection:
    """Return the keys that adapt every expert, in either version."""
    own = {"lora_target_parameters": EXPERTS if MAJOR >= 5 else [], **own}
    return LoraSection(lora_r=4, lora_alpha=8, **own)


def adapted(model) -> set[str]:
    """Return the adapted weights, without their layer."""
    return {
        f"{name}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", "")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def shaken(model):
    """Give every trained parameter another value, as training would."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 33)[None]).logits


# transformers 4.50 gives these attention classes of their own, which packing does not reach.
PADDED = {"olmoe", "qwen2-moe"} if MAJOR < 5 else set()


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_step_equals_plain_transformers_and_peft(family, padding_free, tmp_path):
    if padding_free and family in PADDED:
        pytest.skip("test_packing_is_proven_on_mixtures shows that it is padded")
    rows, lora = make_rows(), section()
    losses, adapter, order = ours(
        tiny_model(family), rows, tmp_path, padding_free=padding_free, lora=lora
    )
    routers = ["gate", "shared_expert_gate"][: 2 if family == "qwen2-moe" else 1]
    linear = {"target_modules": "all-linear", "exclude_modules": routers}
    if MAJOR >= 5 and family != "qwen2-moe":  # there PEFT turns all-linear into experts of its own
        linear = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    targets = linear | {"target_parameters": lora.lora_target_parameters or None}
    expected, expected_adapter = plain(tiny_model(family), rows, order, lora=lora, targets=targets)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    assert adapter.keys() == expected_adapter.keys()
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, expected_adapter[name], rtol=1e-4, atol=1e-4)
    assert any("experts" in name for name in adapter)


@pytest.mark.parametrize("family", MIXTURES)
def test_packing_is_proven_on_mixtures(family):
    model = shaken(add_adapter(tiny_model(family), section(), seed=1))
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    assert verify(causal).startswith("padding is used" if family in PADDED else "")
    assert (causal.packed is None) is (family in PADDED)


def test_experts_that_no_token_reaches_have_gradients_of_zero():
    model = shaken(add_adapter(tiny_model("mixtral"), section(), seed=1))
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    ids, marks = make_rows(1)[0]  # of one token that is trained, and so of two experts a layer
    causal.loss(MicroBatch([ids[:2]], [marks[:2] | True])).backward()
    gradients = {name: p.grad for name, p in trainable_parameters(model).items()}
    assert None not in gradients.values()
    experts = [g for name, g in gradients.items() if "experts" in name and "lora_B" in name]
    if MAJOR >= 5:  # the columns of lora_B are the experts of each rank
        experts = [one for g in experts for one in g.view(len(g), 4, 6).unbind(-1)]
    reached = sum(bool(one.any()) for one in experts)
    assert 0 < reached < len(experts)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_adapter_of_experts_loads_and_merges_with_plain_peft(family, tmp_path):
    model = shaken(add_adapter(tiny_model(family), section(), seed=3))
    trained = logits(model)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path))
    assert adapted(loaded) == adapted(model)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, logits(tiny_model(family)), atol=1e-2)


@fused
def test_all_linear_leaves_fused_experts_alone_and_the_plan_says_how_to_train_them():
    lora = LoraSection(lora_r=4)
    model = add_adapter(tiny_model("mixtral"), lora, seed=1)
    assert {name.rsplit(".", 2)[-2] for name in adapted(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    total = sum(p.numel() for p in tiny_model("mixtral").parameters())
    (note,) = reach.notes(model, total, lora)
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    assert f"reaches {100 * attention / total:.0f}% of the parameters" in note
    assert "experts fused in one tensor (experts.gate_up_proj, experts.down_proj)" in note
    assert "--lora_target_parameters experts.gate_up_proj,experts.down_proj" in note
    (note,) = reach.notes(model, total, LoraSection(lora_r=4, lora_dropout=0.1))
    assert note.endswith("experts.down_proj, without lora_dropout")


@fused
def test_the_plan_counts_both_tensors_of_experts_and_says_where_they_may_not_be_served():
    model = add_adapter(tiny_model("mixtral"), section(), seed=1)
    total = sum(p.numel() for p in tiny_model("mixtral").parameters())
    share, served = reach.notes(model, total, section())
    whole = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 6 * 3 * 32 * 48)
    assert f"reaches {100 * whole / total:.0f}% of the parameters" in share
    assert "routers (mlp.gate)" in share
    assert "vLLM and SGLang" in served
    assert "111 kB" in served  # 6 experts of 3 x 32 x 48 numbers in float32


def test_a_balancing_loss_that_the_model_asks_for_is_not_added_and_the_plan_says_so():
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    peft_model = add_adapter(model, section(), seed=1)
    assert "output_router_logits) is not added" in reach.notes(peft_model, 1, section())[-1]
    causal = CausalLM(peft_model, device="cpu", padding_free=True, chunk=16, precision="float32")
    assert verify(causal) == ""


def deepseek():
    """Return a model of experts, shared experts and a dense layer, all with a down_proj."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(7)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).float().eval().requires_grad_(False)


@fused
def test_linear_layers_that_peft_takes_for_experts_are_adapted_as_linear_layers(tmp_path):
    model = shaken(add_adapter(deepseek(), LoraSection(lora_r=4), seed=1))
    names = adapted(model)
    for layer, block in ((0, "mlp"), (1, "mlp.shared_experts")):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            assert f"base_model.model.model.layers.{layer}.{block}.{projection}.weight" in names
    assert not {name for name in names if ".experts." in name or name.endswith(".gate.weight")}
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(deepseek(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@fused
def test_with_dropout_such_layers_are_named_as_left_out_or_refused_where_they_are_asked_for():
    lora = LoraSection(lora_r=4, lora_dropout=0.1)
    model = add_adapter(deepseek(), lora, seed=1)
    (note,) = reach.notes(model, 1, lora)
    assert "linear layers (mlp.gate_proj, mlp.up_proj, mlp.down_proj and 3 more)" in note
    named = LoraSection(lora_r=4, lora_dropout=0.1, lora_target_modules=["o_proj", "down_proj"])
    with pytest.raises(ConfigError) as caught:
        add_adapter(deepseek(), named, seed=1)
    assert "down_proj cannot be adapted with lora_dropout 0.1" in caught.value.block()


@fused
def test_a_pattern_adapts_the_layers_that_it_matches_and_no_others():
    lora = LoraSection(lora_r=4, lora_target_modules=r".*layers\.1\..*(o|down)_proj")
    layer = "base_model.model.model.layers.1"
    assert adapted(add_adapter(deepseek(), lora, seed=1)) == {
        f"{layer}.self_attn.o_proj.weight",
        f"{layer}.mlp.shared_experts.down_proj.weight",
    }


@pytest.mark.parametrize("asked", ["mlp.experts.w1", "gate_up"])
def test_a_parameter_that_is_not_there_is_refused_with_those_that_are(asked):
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("olmoe"), LoraSection(lora_target_parameters=[asked]), seed=1)
    (problem,) = caught.value.problems
    assert asked in problem.what
    assert ("experts.gate_up_proj, experts.down_proj" in problem.why) is (MAJOR >= 5)


@fused
def test_an_expert_layer_of_transformers_4_is_refused_with_the_tensor_that_replaced_it():
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("mixtral"), LoraSection(lora_target_modules=["w1"]), seed=1)
    assert "--lora_target_parameters experts.gate_up_proj" in caught.value.block()


@pytest.mark.parametrize("key", ["use_4bit", "use_8bit"])
def test_experts_that_would_stay_in_16_bits_are_refused_with_their_bytes(key):
    model, asked = tiny_model("mixtral"), ModelSection(**{key: True})
    quantize.refuse_fused_experts(ModelSection(), model)
    quantize.refuse_fused_experts(asked, tiny_model("llama"))
    if MAJOR < 5:
        quantize.refuse_fused_experts(asked, model)
        return
    with pytest.raises(ConfigError) as caught:
        quantize.refuse_fused_experts(asked, model)
    block = caught.value.block()
    assert f"{key} cannot quantize the experts of mixtral" in block
    assert "experts.gate_up_proj, experts.down_proj" in block
    assert "111 kB would stay in 16 bits" in block  # 2 layers of 6 x 3 x 32 x 48 numbers
    assert "LORA_STACK=cu121" in block


def test_experts_that_are_fused_in_every_version_are_refused_without_another_stack():
    with pytest.raises(ConfigError) as caught:
        quantize.refuse_fused_experts(ModelSection(use_4bit=True), mixture("Jetmoe"))
    assert "input_linear.weight" in caught.value.block()
    assert "LORA_STACK" not in caught.value.block()


@fused
def test_adapters_of_experts_are_float32_on_a_base_in_16_bits():
    model = add_adapter(tiny_model("mixtral").to(torch.bfloat16), section(), seed=1)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


def test_mixtures_in_bfloat16_are_trained_scored_and_generate():
    model = shaken(add_adapter(tiny_model("mixtral").to(torch.bfloat16), section(), seed=1))
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="bfloat16")
    batch = MicroBatch(*zip(*make_rows(4), strict=True))
    loss = causal.loss(batch)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(model).values())
    assert float(loss.detach()) == pytest.approx(causal.score(batch)[0], rel=1e-3)
    with causal.generating() as generator, torch.no_grad():
        ids = torch.arange(5, 9)[None]
        assert generator.generate(input_ids=ids, max_new_tokens=4).shape[1] > 4


def test_recomputing_activations_of_adapted_experts_changes_no_gradient():
    results = []
    for has_checkpointing in (False, True):
        base = tiny_model("mixtral")
        model = shaken(add_adapter(base, section(), seed=1)).train()
        if has_checkpointing:
            enable_checkpointing(base)
        causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
        causal.loss(MicroBatch(*zip(*make_rows(4), strict=True))).backward()
        results.append({name: p.grad for name, p in trainable_parameters(model).items()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-6, atol=1e-6)


def test_a_model_with_adapted_experts_computes_as_its_base_to_find_rows_that_overflow():
    model = shaken(add_adapter(tiny_model("olmoe"), section(), seed=1))
    before = adapter_state(model)
    with _as_base(model):
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")))
    after = adapter_state(model)
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
