"""Frozen RMS norms that keep their input and one number a token for the backward pass.

    y = x / sqrt(mean(x x) + eps) w

transformers computes this by eight operations in float32, and autograd keeps most of their results.
A layer's own `forward` is exchanged where a comparison on random numbers shows that it computes
this, with w its weight or, in Gemma's models, one more than that; other norms stay as they are.

Legend: W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

OWN_FORWARD = "_lora_trainer_own_norm"
EPSILONS = ("variance_epsilon", "eps", "epsilon")
# In float32, the largest difference that the order of operations explains.
TOLERANCE = 1e-5
COMPARED_TOKENS = 4


class _RmsNorm(torch.autograd.Function):
    """The norm and its gradient to x, computed in float32 whatever x is in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight_W)
        return (wide * inverse).mul_(weight_W).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight_W = ctx.saved_tensors
        normed = x * inverse
        scaled = gradients[0] * weight_W
        along = (scaled * normed).mean(-1, keepdim=True)
        return torch.addcmul(scaled, normed, along, value=-1).mul_(inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, weight_W: Tensor, epsilon: float) -> Tensor:
    """Return the norm of `x` (..., W) in its precision; by one kernel where PyTorch has it."""
    if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm"):
        made: Tensor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight_W, epsilon)[0]
        return made
    output: Tensor = _RmsNorm.apply(x, weight_W, epsilon)
    return output


def install(model: nn.Module) -> int:
    """Exchange what every frozen RMS norm computes; return how many there are.

    Outputs are in the input's precision, where the weights are float32 too.
    """
    count = 0
    offsets: dict[type, float | None] = {}
    for module in model.modules():
        if not _may_be_rms_norm(module):
            continue
        kind = type(module)
        if kind not in offsets:
            offsets[kind] = _offset(module)
        offset = offsets[kind]
        if offset is not None:
            setattr(module, OWN_FORWARD, module.forward)
            module.forward = _forward_of(module, offset)
            count += 1
    return count


def remove(model: nn.Module) -> None:
    """Give every norm its own forward back."""
    for module in model.modules():
        if hasattr(module, OWN_FORWARD):
            del module.forward
            delattr(module, OWN_FORWARD)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let every norm compute what it did before for a while, for a comparison."""
    exchanged = [(m, m.forward) for m in model.modules() if hasattr(m, OWN_FORWARD)]
    try:
        for module, _ in exchanged:
            module.forward = getattr(module, OWN_FORWARD)
        yield
    finally:
        for module, ours in exchanged:
            module.forward = ours


def _may_be_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not weight.requires_grad
        and getattr(module, "bias", None) is None
        and _epsilon(module) is not None
        and not hasattr(module, OWN_FORWARD)
    )


def _epsilon(module: Any) -> float | None:
    found = (getattr(module, name, None) for name in EPSILONS)
    return next((float(value) for value in found if isinstance(value, float)), None)


@torch.no_grad()
def _offset(module: Any) -> float | None:
    """Return what is added to the norm's weight, 0 or 1; None where it computes something else."""
    weight_W, epsilon = module.weight.float(), _epsilon(module)
    assert epsilon is not None
    if weight_W.device.type == "meta":
        return 1.0 if "gemma" in type(module).__name__.lower() else 0.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, COMPARED_TOKENS, len(weight_W), generator=generator).to(weight_W.device)
    before, module.weight.data = module.weight.data, weight_W
    try:
        own = module(x)
    except Exception:  # it takes more than its input, or another shape
        return None
    finally:
        module.weight.data = before
    for offset in (0.0, 1.0):
        ours = _RmsNorm.apply(x, weight_W + offset, epsilon)
        if own.shape == ours.shape and torch.allclose(own, ours, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _forward_of(module: Any, offset: float) -> Callable[..., Tensor]:
    epsilon = _epsilon(module)
    assert epsilon is not None
    own: Callable[..., Tensor] = getattr(module, OWN_FORWARD)
    wide = module.weight.detach().float() + offset
    # A quantized base has its norms in float32; the one kernel wants one precision. Layers that
    # are shared out move to their device later.
    weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:
            return own(x, *others, **named)
        key = x.dtype, x.device
        if key not in weights:
            weights[key] = wide.to(x.device, x.dtype)
        return rms_norm(x, weights[key], epsilon)

    return forward
