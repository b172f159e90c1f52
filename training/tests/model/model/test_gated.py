"""Gated activations of ours compute what transformers' modules do, or leave it to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_trainer.model import exchange, gated
from support.families import FAMILIES, tiny_model
from support.passes import is_equal, logits_and_gradient


@pytest.mark.parametrize("name", gated.ACTIVATIONS)
def test_gradients_are_those_of_numbers(name: str) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    activation = gated.ACTIVATIONS[name]
    assert torch.autograd.gradcheck(lambda g, u: gated.gated(g, u, activation), (gate, up))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_of_every_family_stay_the_same(family: str) -> None:
    model = tiny_model(family).double()
    own = logits_and_gradient(model)
    assert gated.install(model) == 2
    assert is_equal(logits_and_gradient(model), own)
    exchange.remove(model)
    assert torch.equal(logits_and_gradient(model)[0], own[0])


def test_experts_that_are_modules_are_fused_as_any_other() -> None:
    model = tiny_model("qwen2-moe")
    own = logits_and_gradient(model)
    assert gated.install(model) >= 2  # the shared experts; in transformers 4 the others too
    for ours, expected in zip(logits_and_gradient(model), own, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    """A gated activation by a formula that its arguments decide."""

    def __init__(self, activation: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 4)
        self.up_proj = nn.Linear(8, 4)
        self.down_proj = nn.Linear(4, 8)
        self.act_fn, self.factor = activation, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.factor)


@pytest.mark.parametrize("module", [Gated(nn.SiLU(), 1.001), Gated(nn.Mish())], ids=str)
def test_a_module_that_computes_something_else_is_left_alone(module: nn.Module) -> None:
    assert gated.install(nn.Sequential(module)) == 0


def test_each_of_two_modules_of_a_class_is_seen_for_itself() -> None:
    model = nn.Sequential(Gated(nn.SiLU()), Gated(nn.SiLU(), 0.5), Gated(nn.GELU()))
    expected = model(torch.ones(1, 8))
    assert gated.install(model) == 2
    torch.testing.assert_close(model(torch.ones(1, 8)), expected)
