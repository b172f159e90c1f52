"""Frozen RMS norms that keep their input and one number a token for the backward pass.

    y = x / sqrt(mean(x x) + eps) w

transformers computes this by eight operations in float32, and autograd keeps most of their results.
Projections that read a norm compute it again from the same two (`recompute.py`).
A layer's own `forward` is exchanged where a comparison on random numbers shows that it computes
this, with w its weight or, in Gemma's models, one more than that; other norms stay as they are.

Legend: W width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .exchange import exchange, is_own
from .recompute import Formula, computed_by

aten = torch.ops.aten

EPSILONS = ("variance_epsilon", "eps", "epsilon")
# In float32, the largest difference that the order of operations explains.
TOLERANCE = 1e-5
COMPARED_TOKENS = 4


class _RmsNorm(torch.autograd.Function):
    """The norm, the inverse of each token's root mean square, and the gradient to x.

    Computed in float32 at least, whatever x is in.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        width = x.shape[-1]
        inverse = length.mul_(width**-0.5).square_().add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight_W)
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)
        return _scaled(x * inverse, weight_W, x), inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, inverse, weight_W = ctx.saved_tensors
        if gradients[0] is None:
            return None, None, None
        return *_gradients(gradients[0], x * inverse, x, inverse, weight_W), None, None


def _scaled(one: Tensor, other: Tensor, like: Tensor) -> Tensor:
    """Return a product in the precision of `like`, by one operation."""
    return torch.mul(one, other, out=torch.empty_like(like))


def _again(x: Tensor, inverse: Tensor, weight_W: Tensor) -> tuple[Tensor, Tensor]:
    normed = x * inverse
    return _scaled(normed, weight_W, x), normed


def _gradients(
    above: Tensor, normed: Tensor, x: Tensor, inverse: Tensor, weight_W: Tensor
) -> tuple[Tensor, ...]:
    scaled = above * weight_W
    along = (scaled * normed).mean(-1, keepdim=True)
    return (_scaled(torch.addcmul(scaled, normed, along, value=-1), inverse, x),)


def _kernel_again(
    x: Tensor, inverse: Tensor, weight_W: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    output: Tensor = aten._fused_rms_norm(x, [x.shape[-1]], weight_W, epsilon)[0]
    return output, inverse


def _kernel_gradients(
    above: Tensor, work: Tensor, x: Tensor, inverse: Tensor, weight_W: Tensor
) -> tuple[Tensor, ...]:
    del work
    gradients = aten._fused_rms_norm_backward(
        above, x, [x.shape[-1]], inverse, weight_W, [True, False]
    )
    return (gradients[0],)


OPERATIONS = Formula(1, _again, _gradients)


@cache
def _kernel(epsilon: float) -> Formula:
    return Formula(1, partial(_kernel_again, epsilon=epsilon), _kernel_gradients)


def rms_norm(x: Tensor, weight_W: Tensor, epsilon: float) -> Tensor:
    """Return the norm of `x` (..., W) in its precision; by one kernel where PyTorch has it."""
    if x.is_cuda and hasattr(aten, "_fused_rms_norm"):
        output, inverse = aten._fused_rms_norm(x, [x.shape[-1]], weight_W, epsilon)
        return computed_by(_kernel(epsilon), output, x, inverse.detach(), weight_W)
    output, inverse = _RmsNorm.apply(x, weight_W, epsilon)
    return computed_by(OPERATIONS, output, x, inverse, weight_W)


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
            exchange(module, _forward_of(module, offset))
            count += 1
    return count


def _may_be_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not weight.requires_grad
        and getattr(module, "bias", None) is None
        and _epsilon(module) is not None
        and is_own(module)
    )


def _epsilon(module: Any) -> float | None:
    values = (getattr(module, name, None) for name in EPSILONS)
    return next((float(value) for value in values if isinstance(value, float)), None)


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
        ours, _ = _RmsNorm.apply(x, weight_W + offset, epsilon)
        if own.shape == ours.shape and torch.allclose(own, ours, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _forward_of(module: Any, offset: float) -> Callable[..., Tensor]:
    epsilon = _epsilon(module)
    assert epsilon is not None
    own: Callable[..., Tensor] = module.forward
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
