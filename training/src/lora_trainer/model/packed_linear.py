"""Linear layers that keep and allocate what bitsandbytes' do, on the meta device.

bitsandbytes' own run on no meta tensor in 0.45.5, and importing it takes seconds.
Source: bitsandbytes/autograd/_functions.py (MatMul4Bit, MatMul8bitFp, MatMul8bitLt) and PEFT's
lora/bnb.py, of the releases in the stacks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer in `bits` bits: its matrix is widened for each product, and let go."""

    bits: int
    device_type: str
    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Return the product, in the input's precision."""
        if self.bits == 4:
            output: Tensor = _Widened.apply(input.to(self.compute_dtype), self.weight, False, False)
            return output.to(input.dtype)
        eighth: Tensor = _Widened.apply(input, self.weight, True, self.device_type == "cuda")
        return eighth


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, keeps_input: bool, has_int8_product: bool
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        ctx.x = x if keeps_input else None
        if has_int8_product:  # of rows rounded to 8 bits, by way of 16, into 32-bit sums
            rounded = torch.empty_like(x.to(torch.float16), dtype=torch.int8)
            sums = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32)
            del rounded
            return sums.to(torch.float16).to(x.dtype)
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outputs
        matrix = torch.empty_like(ctx.weight, dtype=ctx.dtype)
        return gradient.to(ctx.dtype) @ matrix, None, None, None


def pack(model: Any, bits: int, device: str, dtype: torch.dtype) -> None:
    """Turn the linear layers of a model on the meta device into packed ones, but not its head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = PackedLinear
            assert isinstance(module, PackedLinear)
            module.bits, module.device_type, module.compute_dtype = bits, device, dtype


def adapt(model: Any) -> None:
    """Let PEFT's layers around packed ones compute as those around bitsandbytes' do."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, PackedLinear) and not getattr(module, "lora_variant", {}):
            module.forward = partial(_forward, module)


def _forward(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer.base_layer(x)
    if layer.base_layer.bits == 4:
        result = result.clone()
    dtype = result.dtype
    (name,) = layer.lora_A.keys()
    is_cast = torch.is_autocast_enabled()
    if not is_cast:
        x = x.to(layer.lora_A[name].weight.dtype)
    output = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x)))
    output = output * layer.scaling[name]
    return result + (output if is_cast else output.to(dtype))
