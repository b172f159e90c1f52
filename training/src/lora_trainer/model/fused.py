"""One autograd function for each adapted projection, instead of PEFT's four operations.

    y = x W' + b + s (x A') B'

It keeps x and x A' for the backward pass and nothing else, and adds the adapter's part to
the base model's in place. PEFT's modules and the names of their parameters stay as they
are: only what a layer computes is exchanged, and PEFT's own forward is called for
whatever is not covered (dropout, DoRA, quantized layers, a switched-off or merged adapter).

Legend: T tokens, W input width, O output width, R rank; ' is the transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's usual name
from torch import Tensor, nn

# PEFT's own forward of a layer whose computation is exchanged, kept under this name.
OWN_FORWARD = "_lora_trainer_own_forward"


class _FusedLora(torch.autograd.Function):
    """The projection and its gradients to x, A and B; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OW: Tensor,
        bias_O: Tensor | None,
        a_RW: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        x_TW = x.reshape(-1, x.shape[-1])
        low_TR = x_TW @ a_RW.t()
        output_TO = F.linear(x_TW, weight_OW, bias_O)
        output_TO.addmm_(low_TR, b_OR.t(), alpha=scaling)
        ctx.save_for_backward(x_TW, low_TR, weight_OW, a_RW, b_OR)
        ctx.scaling = scaling
        return output_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        x_TW, low_TR, weight_OW, a_RW, b_OR = ctx.saved_tensors
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        low_gradient_TR = (gradient_TO @ b_OR).mul_(ctx.scaling)
        a_gradient = low_gradient_TR.t() @ x_TW
        b_gradient = (gradient_TO.t() @ low_TR).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient_TO @ weight_OW
            x_gradient.addmm_(low_gradient_TR, a_RW)
            x_gradient = x_gradient.view(*gradient.shape[:-1], -1)
        return x_gradient, None, None, a_gradient, b_gradient, None


def install(model: nn.Module) -> int:
    """Exchange what every covered projection computes; return how many there are."""
    count = 0
    for module in model.modules():
        if is_covered(module) and not hasattr(module, OWN_FORWARD):
            setattr(module, OWN_FORWARD, module.forward)
            module.forward = _forward_of(module)
            count += 1
    return count


def remove(model: nn.Module) -> None:
    """Give every projection PEFT's own forward back."""
    for module in model.modules():
        if hasattr(module, OWN_FORWARD):
            del module.forward
            delattr(module, OWN_FORWARD)


def is_covered(module: Any) -> bool:
    """Return whether a module is a plain LoRA projection: one adapter, no dropout, no DoRA."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
        return False
    name, *others = module.lora_A.keys()
    weights = (module.base_layer.weight, module.lora_A[name].weight, module.lora_B[name].weight)
    return (
        not others
        and not getattr(module, "lora_variant", {})
        and not module.use_dora.get(name, False)
        and not module.fan_in_fan_out
        and isinstance(module.lora_dropout[name], nn.Identity)
        and module.lora_B[name].bias is None
        and not module.base_layer.weight.requires_grad
        and len({weight.dtype for weight in weights}) == 1
    )


def _forward_of(module: Any) -> Callable[..., Tensor]:
    """Return what a covered projection computes, PEFT's own forward where its state asks for it."""
    own: Callable[..., Tensor] = getattr(module, OWN_FORWARD)
    (name,) = module.lora_A.keys()
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]

    def forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        is_plain = not (module.disable_adapters or module.merged or others or named)
        if not is_plain or module.active_adapters != [name] or x.dtype != a.weight.dtype:
            return own(x, *others, **named)
        output: Tensor = _FusedLora.apply(
            x, base.weight, base.bias, a.weight, b.weight, module.scaling[name]
        )
        return output

    return forward
