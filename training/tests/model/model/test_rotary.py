"""Rotary embeddings of ours compute what transformers' own functions do, or leave it to them."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from lora_trainer.model import exchange, rotary
from support.families import FAMILIES, tiny_model
from support.passes import is_equal, logits_and_gradient


def drawn(width: int, turned: int) -> list[torch.Tensor]:
    """Return query, key, cosine and sine; there are half as many keys."""
    torch.manual_seed(0)
    heads = [
        torch.randn(2, count, 5, width, dtype=torch.float64, requires_grad=True) for count in (4, 2)
    ]
    return [*heads, *torch.randn(2, 2, 5, turned, dtype=torch.float64)]


@pytest.mark.parametrize("turned", [6, 2])
def test_gradients_are_those_of_numbers(turned: int) -> None:
    query, key, cos, sin = drawn(6, turned)
    assert torch.autograd.gradcheck(lambda q, k: rotary.rotate(q, k, cos, sin), (query, key))


@pytest.mark.parametrize(("module", "turned"), [(modeling_llama, 6), (modeling_phi3, 2)])
def test_a_models_own_function_gives_the_same(module, turned: int) -> None:
    own = module.apply_rotary_pos_emb
    given = drawn(6, turned)
    for one, other in zip(rotary._fused(own)(*given), own(*given), strict=True):
        torch.testing.assert_close(one, other)
        assert one.grad_fn.name() != other.grad_fn.name()


def test_a_query_alone_is_left_to_the_model_and_named_arguments_are_not() -> None:
    def own(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
        if k is None:
            return whole(q, q, cos, sin, unsqueeze_dim=unsqueeze_dim)[0]
        return whole(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    whole = modeling_llama.apply_rotary_pos_emb
    query, key, cos, sin = drawn(6, 6)
    apply = rotary._fused(own)
    alone, (together, _) = apply(query, cos=cos, sin=sin), apply(query, key, cos=cos, sin=sin)
    torch.testing.assert_close(alone, together)
    assert "Rotary" in together.grad_fn.next_functions[0][0].name()


def test_interleaved_halves_are_left_to_the_model() -> None:
    assert rotary._fused(modeling_cohere.apply_rotary_pos_emb) is None


def test_heads_in_another_precision_than_the_cosine_are_left_to_the_model() -> None:
    query, key, cos, sin = drawn(6, 6)
    apply = rotary._fused(modeling_llama.apply_rotary_pos_emb)
    turned, _ = apply(query.bfloat16(), key.bfloat16(), cos.float(), sin.float())
    assert turned.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_of_every_family_stay_the_same(family: str) -> None:
    model = tiny_model(family).double()
    own = logits_and_gradient(model)
    assert rotary.install(model) == (0 if family == "cohere" else 2)
    assert is_equal(logits_and_gradient(model), own)
    with exchange.switched_off(model):
        assert torch.equal(logits_and_gradient(model)[0], own[0])
    exchange.remove(model)
    assert torch.equal(logits_and_gradient(model)[0], own[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_cosine_and_sine_are_computed_once_for_all_layers(family: str) -> None:
    model = tiny_model(family)
    calls: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(input_ids=torch.arange(5, 15)[None])
    # Some have two kinds of layers, whose angles differ.
    assert len(calls) == len(set(calls)) > 0
