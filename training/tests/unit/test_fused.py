"""The fused projection computes what PEFT's own operations do, or leaves it to them."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import fused
from lora_trainer.model.adapter import add_adapter, trainable_parameters


def adapted(family: str = "llama", **keys):
    """Return a tiny model whose adapter has left its beginning."""
    model = add_adapter(tiny_model(family), LoraSection(lora_r=4, **keys), seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def loss_and_gradients(model):
    model.zero_grad(set_to_none=True)
    ids = torch.arange(5, 45).view(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_those_of_autograd_in_double_precision(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = True) -> torch.Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.requires_grad_(requires_grad)

    x, weight, a, b = draw(2, 3, 5), draw(7, 5, requires_grad=False), draw(2, 5), draw(7, 2)
    bias = draw(7, requires_grad=False) if has_bias else None
    assert torch.autograd.gradcheck(fused._FusedLora.apply, (x, weight, bias, a, b, 0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_every_family_are_those_of_peft(family: str) -> None:
    model = adapted(family)
    loss, gradients = loss_and_gradients(model)
    assert fused.install(model) > 0
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    fused.remove(model)
    assert loss_and_gradients(model)[0] == loss


@pytest.mark.parametrize("keys", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_is_not_covered_is_left_to_peft(keys: dict) -> None:
    assert fused.install(adapted(**keys)) == 0


def test_switched_off_and_merged_adapters_are_left_to_peft() -> None:
    model = adapted()
    fused.install(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
    plain = tiny_model("llama")(input_ids=ids).logits
    torch.testing.assert_close(base, plain)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, base, atol=1e-2)


def test_names_and_weights_that_are_saved_stay_as_they_are() -> None:
    model = adapted()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    fused.install(model)
    assert fused.install(model) == 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
