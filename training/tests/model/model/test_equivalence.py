"""Our loop trains what plain transformers + PEFT train: every loss, and the adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import attention
from lora_trainer.model.compat import MAJOR
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import verify
from support.families import FAMILIES, tiny_model
from support.plain_peft import make_rows, ours, plain

# transformers 4.50 computes every layer's attention in the window that Qwen 2 has in its last
# ones only; packing gives each layer its own, is found to differ, and is not used.
WINDOW_IN_EVERY_LAYER = {"qwen2-window"} if MAJOR < 5 else set()


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_every_family_equals_plain_transformers(family, padding_free, tmp_path):
    if padding_free and family in WINDOW_IN_EVERY_LAYER:
        pytest.skip("test_packing_is_proven_on_every_family shows that it is padded")
    rows, lora = make_rows(), LoraSection(lora_r=4, lora_alpha=8)
    losses, adapter, sampler = ours(
        tiny_model(family), rows, tmp_path, padding_free=padding_free, lora=lora
    )
    expected, expected_adapter = plain(tiny_model(family), rows, sampler, lora=lora)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert adapter.keys() == expected_adapter.keys()
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, expected_adapter[name], rtol=1e-4, atol=1e-4)
    assert losses[-1] < losses[0]


def test_a_head_that_is_trained_in_full_equals_plain_transformers(tmp_path):
    lora = LoraSection(lora_r=4, lora_alpha=8, modules_to_save=["lm_head"])
    rows = make_rows()
    losses, adapter, sampler = ours(
        tiny_model("llama"), rows, tmp_path, padding_free=True, lora=lora
    )
    expected, expected_adapter = plain(tiny_model("llama"), rows, sampler, lora=lora)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, expected_adapter[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputing_activations_changes_no_loss(family, tmp_path):
    rows, lora = make_rows(), LoraSection(lora_r=4, lora_alpha=8, lora_dropout=0.1)
    results = []
    for has_checkpointing in (False, True):
        # Dropout draws from the global generator, as a run's does.
        model = tiny_model(family)
        torch.manual_seed(1)
        own = {"has_checkpointing": has_checkpointing}
        results.append(ours(model, rows, tmp_path, padding_free=True, lora=lora, own=own))
    (plain_losses, plain_adapter, _), (losses, adapter, _) = results
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, plain_adapter[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_proven_on_every_family(family):
    causal = CausalLM(
        tiny_model(family), device="cpu", padding_free=True, chunk=16, precision="float32"
    )
    if family in WINDOW_IN_EVERY_LAYER:
        assert verify(causal).startswith("padding is used")
        return
    assert verify(causal) == ""
    assert causal.packed is not None


def test_a_head_that_does_something_unknown_is_left_to_the_models_own_forward():
    model = tiny_model("llama")
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    batch = MicroBatch(*zip(*make_rows(5), strict=True))
    expected = causal.score(batch)
    causal.head = replace(causal.head, multiplier=1.5)
    assert "decoder and head, called separately, differ" in verify(causal)
    assert causal.score(batch) == pytest.approx(expected, rel=1e-5)


def verified_with(broken: attention.PackedAttention) -> tuple[CausalLM, str]:
    causal = CausalLM(
        tiny_model("llama"), device="cpu", padding_free=True, chunk=16, precision="float32"
    )
    attention._register(ALL_ATTENTION_FUNCTIONS, broken)
    causal.packed = broken
    return causal, verify(causal)


def test_packing_that_differs_falls_back_to_padding():
    class Doubling(attention.PackedAttention):
        def __call__(self, *inputs, **arguments):
            output, _ = super().__call__(*inputs, **arguments)
            return output * 2, None

    causal, reason = verified_with(Doubling())
    assert "padding is used" in reason
    assert causal.packed is None


def test_attention_across_examples_is_found_and_given_one_at_a_time():
    class Forgetful(attention.PackedAttention):
        """Attends across the borders of examples."""

        def __call__(self, module, query, *others, **arguments):
            with self.alone(query.shape[2]):
                return super().__call__(module, query, *others, **arguments)

    causal, reason = verified_with(Forgetful())
    assert reason.startswith("one example at a time: LlamaAttention")
    assert causal.packed is not None


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_chunked():
    batch = MicroBatch(*zip(*make_rows(5), strict=True))
    losses = []
    for chunk in (1, 7, 1000):
        causal = CausalLM(
            tiny_model("gemma2"), device="cpu", padding_free=True, chunk=chunk, precision="float32"
        )
        losses.append(causal.score(batch)[0])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
