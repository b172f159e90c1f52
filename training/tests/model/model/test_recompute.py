"""Inputs that are computed again give the gradients of inputs that are kept, and keep less."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import exchange, fused, gated, norms, recompute, rotary
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.compat import enable_checkpointing
from lora_trainer.model.forward import CausalLM
from support.families import COMMON, FAMILIES, tiny_model

LAYERS, TOKENS = COMMON["num_hidden_layers"], 40


def adapted(family: str, **keys):
    """Return a tiny model in float64 whose adapter has left its beginning."""
    model = add_adapter(tiny_model(family).double(), LoraSection(lora_r=4, **keys), seed=3)
    model.double()
    torch.manual_seed(9)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def fuse(model) -> None:
    fused.install(model, torch.float64)
    for kind in (norms, rotary, gated):
        assert kind.install(model) > 0


def gradients(model, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return those of two micro-batches together."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    for start in (5, 15):
        ids = torch.arange(start, start + TOKENS).view(2, -1)
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def kept(monkeypatch) -> None:
    """Have every projection keep its input."""
    monkeypatch.setattr(fused, "source_of", lambda x, _: recompute.Source(x, (x,)))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"cohere"}))
def test_all_fused_layers_together_give_the_gradients_of_plain_ones(family: str) -> None:
    model = adapted(family)
    expected = gradients(model)
    fuse(model)
    for name, gradient in gradients(model).items():
        # transformers' norms compute in float32 here, too.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    fused.remove(model)
    exchange.remove(model)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model).items())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_an_input_computed_again_gives_the_gradients_of_one_that_is_kept(
    dropout: float, is_checkpointed: bool, monkeypatch
) -> None:
    model = adapted("qwen2", lora_dropout=dropout)
    fuse(model)
    if is_checkpointed:
        enable_checkpointing(model.get_base_model())
    ours = gradients(model)
    assert dropout == 0 or not torch.equal(
        *(next(iter(g.values())) for g in (ours, gradients(model, 2)))
    )
    kept(monkeypatch)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-12)


def test_neither_norms_nor_activations_are_kept(monkeypatch) -> None:
    model = adapted("llama")
    fuse(model)

    def saved_bytes() -> int:
        saved = {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        ids = torch.arange(5, 5 + TOKENS)[None]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids).logits.sum()
        del loss
        return sum(storage.nbytes() for storage in saved.values())

    less = saved_bytes()
    kept(monkeypatch)
    numbers = TOKENS * LAYERS * (2 * COMMON["hidden_size"] + COMMON["intermediate_size"])
    # The first norm has no gradient to give, and keeps nothing else.
    first = TOKENS * COMMON["hidden_size"]
    assert saved_bytes() - less == (numbers - first) * torch.float64.itemsize


def test_an_input_that_was_changed_in_place_is_kept() -> None:
    gate, up = torch.ones(2, 3, 4, requires_grad=True)
    hidden = gated.gated(gate, up, gated.ACTIVATIONS["silu"])
    assert recompute.source_of(hidden, torch.float32).formula is not None
    assert recompute.source_of(hidden, torch.bfloat16).formula is None
    hidden.mul_(2)
    assert recompute.source_of(hidden, torch.float32).tensors == (hidden,)


def test_the_plan_counts_fused_layers_of_each_kind() -> None:
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=3)
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=7, precision="float32")
    assert causal.fused == (
        "14 of 14 adapted modules, 5 norms, 2 rotary embeddings, 2 gated activations"
    )
    causal.leave_layers_alone()
    assert not causal.has_fused_layers
