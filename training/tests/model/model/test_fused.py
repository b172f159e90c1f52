"""Fused projections compute what PEFT's own operations do, or leave it to them."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import fused, quantize
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.recompute import Source
from support.families import FAMILIES, tiny_model


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **keys):
    """Return a tiny model whose adapter has left its beginning."""
    model = add_adapter(tiny_model(family).to(dtype), LoraSection(lora_r=4, **keys), seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def loss_and_gradients(model, dtype: torch.dtype = torch.float32):
    model.zero_grad(set_to_none=True)
    ids = torch.arange(5, 45).view(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainable_parameters(model).items()}


class Block(torch.nn.Module):
    """Three projections of one input, the last with fewer outputs, as attention has them."""

    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(5, 7, bias=has_bias)
        self.k_proj = torch.nn.Linear(5, 3, bias=has_bias)
        self.v_proj = torch.nn.Linear(5, 3, bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def block(has_bias: bool = True, dropout: float = 0.0):
    """Return the projections in float64 with an adapter, and one input of theirs."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    lora = LoraConfig(
        r=2, lora_alpha=3, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    model = inject_adapter_in_model(lora, Block(has_bias)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model.train(), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_those_of_autograd_in_double_precision(has_bias: bool) -> None:
    model, x = block(has_bias)
    assert fused.install(model, torch.float64) == 3
    (group,) = {getattr(m, fused.GROUP) for m in model.modules() if hasattr(m, fused.GROUP)}

    def compute(x: torch.Tensor, *parameters: torch.Tensor):
        group._versions = ()  # gradcheck changes numbers in a way that no version tells
        return fused._FusedLora.apply(group, Source(x, (x,)), x, *parameters)

    assert torch.autograd.gradcheck(compute, (x, *group.parameters()))


def test_each_number_that_dropout_keeps_is_kept_in_the_backward_pass_too() -> None:
    model, x = block(dropout=0.4)
    fused.install(model, torch.float64)
    layer = model.q_proj
    torch.manual_seed(11)
    output = layer(x)
    torch.manual_seed(11)
    mask = fused._mask(x.detach().view(-1, 5), 0.4, int(torch.randint(1 << 62, ())))
    assert 0 < mask.sum() < mask.numel()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    kept = (x.view(-1, 5) * mask / 0.6).view_as(x)
    expected = layer.base_layer(x) + kept @ a.t() @ b.t() * layer.scaling["default"]
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    ours = torch.autograd.grad((output * weights).sum(), [x, a, b])
    own = torch.autograd.grad((expected * weights).sum(), [x, a, b])
    for one, other in zip(ours, own, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_every_family_are_those_of_peft(family: str) -> None:
    model = adapted(family)
    loss, gradients = loss_and_gradients(model)
    assert fused.install(model, torch.float32) == len(gradients) // 2
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-5)
    fused.remove(model)
    assert loss_and_gradients(model)[0] == loss


def test_bfloat16_differs_from_peft_by_rounding_alone() -> None:
    model = adapted(dtype=torch.bfloat16)
    exact = loss_and_gradients(adapted())[1]
    loss, gradients = loss_and_gradients(model, torch.bfloat16)
    assert fused.install(model, torch.bfloat16) > 0
    fused_loss, fused_gradients = loss_and_gradients(model, torch.bfloat16)
    assert fused_loss == pytest.approx(loss, rel=1e-2)

    def error(of: dict) -> float:
        return sum(float((of[n].float() - exact[n]).norm() / exact[n].norm()) for n in exact)

    assert error(fused_gradients) < 1.1 * error(gradients)


@pytest.mark.skipif(not quantize.works_on_cpu(), reason="bitsandbytes packs on GPUs alone here")
def test_a_base_in_4_bits_gives_the_gradients_that_peft_gives(tmp_path) -> None:
    from lora_trainer.config.schema import ModelSection
    from lora_trainer.model import load

    tiny_model("llama").save_pretrained(tmp_path)
    section = ModelSection(model_name_or_path=str(tmp_path), use_4bit=True)
    base = load.load_model(
        load.locate(section), section, dtype=torch.float32, device="cpu", attention="sdpa"
    )
    model = add_adapter(base, LoraSection(lora_r=4), seed=3).train()
    torch.manual_seed(2)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    loss, gradients = loss_and_gradients(model)
    assert fused.install(model, torch.float32) == len(gradients) // 2
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_what_a_projection_returns_may_be_changed_in_place() -> None:
    model, x = block()
    expected = torch.autograd.grad((2 * model(x)).sum(), x)[0]
    fused.install(model, torch.float64)
    outputs = [model.q_proj(x).mul_(2), model.k_proj(x).mul_(2), model.v_proj(x).mul_(2)]
    gradient = torch.autograd.grad(torch.cat(outputs, -1).sum(), x)[0]
    torch.testing.assert_close(gradient, expected)


def test_siblings_are_computed_together_and_kept_no_longer_than_needed() -> None:
    model, x = block()
    fused.install(model, torch.float64)
    group = getattr(model.q_proj, fused.GROUP)
    model.q_proj(x)
    assert set(group._outputs) == {model.k_proj, model.v_proj}
    model.k_proj(x)
    model.v_proj(x)
    assert group._outputs == {}
    assert group._input is None


def test_a_sibling_that_is_given_another_input_computes_that_one() -> None:
    model, x = block()
    other = torch.randn_like(x)
    expected = model.k_proj(other)
    fused.install(model, torch.float64)
    model.q_proj(x)
    torch.testing.assert_close(model.k_proj(other), expected)


def test_an_adapter_that_was_updated_is_not_computed_by_what_was_cast_before() -> None:
    model, x = block()
    fused.install(model, torch.float64)
    before = model.q_proj(x)
    with torch.no_grad():
        model.q_proj.lora_B["default"].weight.mul_(2)
    after = model(x)[..., :7]
    base = model.q_proj.base_layer(x)
    torch.testing.assert_close(after - base, 2 * (before - base))


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_not_covered_is_left_to_peft(keys: dict) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], **keys)
    assert fused.install(inject_adapter_in_model(lora, Block(True)), torch.float32) == 0


def test_switched_off_and_merged_adapters_are_left_to_peft() -> None:
    model = adapted()
    fused.install(model, torch.float32)
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
    fused.install(model, torch.float32)
    assert fused.install(model, torch.float32) == 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
