"""Fused norms compute what transformers' own do, for all families that have RMS norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_trainer.model import exchange, norms
from support.families import FAMILIES, tiny_model


def test_the_gradient_is_that_of_autograd_in_double_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64)
    ours, _ = norms._RmsNorm.apply(x, weight, 1e-5)
    own = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, gradient)[0],
        torch.autograd.grad(own, x, gradient)[0],
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_of_every_family_stay_the_same(family: str) -> None:
    model = tiny_model(family)
    model.requires_grad_(False)
    for module in model.modules():  # weights of 1 would hide one that is left out
        if type(module).__name__.endswith("Norm"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    embedded = model.get_input_embeddings()(torch.arange(5, 25)[None]).requires_grad_()

    def logits_and_gradient():
        logits = model(inputs_embeds=embedded).logits
        return logits, torch.autograd.grad(logits.square().mean(), embedded)[0]

    own = logits_and_gradient()
    expected = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    assert norms.install(model) == expected
    for one, other in zip(logits_and_gradient(), own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with exchange.switched_off(model):
        assert torch.equal(logits_and_gradient()[0], own[0])
    exchange.remove(model)
    assert torch.equal(logits_and_gradient()[0], own[0])


class OddRMSNorm(nn.Module):
    """A norm by another formula under the usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().mean(-1, keepdim=True)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    assert norms.install(nn.Sequential(OddRMSNorm())) == 0


def test_a_norm_that_is_trained_is_left_alone() -> None:
    model = tiny_model("llama").requires_grad_(True)
    assert norms.install(model) == 0


def test_a_norm_whose_weights_are_float32_gives_the_precision_of_its_input() -> None:
    model = tiny_model("llama")
    model.requires_grad_(False)
    norm = model.model.norm
    norm.weight.data = norm.weight.data.float()
    norms.install(model)
    x = torch.randn(1, 3, len(norm.weight), dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16


@pytest.mark.skipif(
    not hasattr(norms.aten, "_fused_rms_norm_backward"), reason="this torch has no kernel for norms"
)
def test_the_kernels_formula_gives_what_our_own_gives() -> None:
    torch.manual_seed(0)
    x, above, weight = torch.randn(3, 6), torch.randn(3, 6), torch.randn(6)

    def backward(grad, x, shape, inverse, weight, mask):
        assert list(shape) == [6] and list(mask) == [True, False]
        return *norms._gradients(grad, x * inverse, x, inverse, weight), torch.empty(0)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm_backward", backward, "CPU")  # PyTorch has it for GPUs alone
    try:
        _, inverse = norms.aten._fused_rms_norm(x, [6], weight, 1e-5)
        results = []
        for formula in (norms.OPERATIONS, norms._kernel(1e-5)):
            again, work = formula.again(x, inverse, weight)
            results.append((again, *formula.gradients(above, work, x, inverse, weight)))
    finally:
        library._destroy()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
