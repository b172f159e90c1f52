"""Rotary position embeddings of query and key, by one autograd function.

    y1 = x1 cos1 - x2 sin1        y2 = x2 cos2 + x1 sin2

x1 and x2 are the halves of a head. transformers takes ten operations, and seventeen in the backward
pass. Here query and key are one tensor, which four operations turn and four turn back; only cosine
and sine are kept, which all layers share.

An attention layer's own `forward` is exchanged for a copy that calls this function instead of the
model's own, where a comparison on random numbers shows that both compute the same. Interleaved and
multimodal variants do not, and stay as they are.

Legend: B batch, T tokens, H heads (of the keys there may be fewer), D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .exchange import exchange, is_own

# What transformers calls the function, in the module of every model that has one.
NAME = "apply_rotary_pos_emb"
# What two orders of the same operations may differ by, in float64.
TOLERANCE = 1e-12
Apply = Callable[..., Any]


class _Rotary(torch.autograd.Function):
    """Query and key turned by their positions; their gradients are turned back.

    Shapes: query and key (B, T, H, D); cos and sin (B, T, 1, R), which turn the first R numbers
    of a head.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.heads = query.shape[2], key.shape[2]
        first, second = sin.chunk(2, -1)
        turned: tuple[Tensor, ...] = _turned(
            torch.cat((query, key), 2), cos, first, second, 1
        ).split(ctx.heads, 2)
        return turned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        turned = _turned(torch.cat(gradients, 2), cos, second, first, -1).split(ctx.heads, 2)
        return *turned, None, None


def _turned(joined: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """Return all heads turned; what is beyond cosine's width stays as it is."""
    part = joined[..., : cos.shape[-1]]
    turned = part * cos
    one, other = part.chunk(2, -1)
    into_one, into_other = turned.chunk(2, -1)
    into_one.addcmul_(other, first, value=-sign)
    into_other.addcmul_(one, second, value=sign)
    if part.shape == joined.shape:
        return turned
    part.copy_(turned)
    return joined


def install(model: nn.Module) -> int:
    """Exchange how every covered attention layer turns its queries; return how many there are."""
    count = 0
    functions: dict[Apply, Apply | None] = {}
    for module in model.modules():
        function: Any = getattr(module.forward, "__func__", None)
        apply = getattr(function, "__globals__", {}).get(NAME)
        if apply is None or NAME not in function.__code__.co_names or not is_own(module):
            continue
        if apply not in functions:
            functions[apply] = _fused(apply)
        fused = functions[apply]
        if fused is not None:
            exchange(module, MethodType(_calling(function, fused), module))
            count += 1
    return count


def _calling(function: Any, fused: Apply) -> FunctionType:
    """Return a copy of a function that finds `fused` under the name of the model's own."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, NAME: fused},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _fused(own: Apply) -> Apply | None:
    """Return what computes the same as a model's own function; None where ours differs."""
    if not _is_same(own, 8):
        return None
    is_partial = _is_same(own, 4)

    def apply(*given: Any, **named: Any) -> Any:
        tensors = (*given, *(named[name] for name in ("cos", "sin") if name in named))
        axis = named.get("unsqueeze_dim", 1)
        is_plain = set(named) <= {"cos", "sin", "unsqueeze_dim"} and axis in (1, 2)
        # Some models also turn a query alone.
        if not is_plain or len(tensors) != 4 or not _is_covered(*tensors, is_partial=is_partial):
            return own(*given, **named)
        return rotate(*tensors, axis)

    return apply


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, axis: int = 1
) -> tuple[Tensor, Tensor]:
    """Return query and key (B, H, T, D), turned; (B, T, H, D) where `axis` is 2."""
    if axis == 1:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    query, key = _Rotary.apply(query, key, cos.unsqueeze(2), sin.unsqueeze(2))
    return (query.transpose(1, 2), key.transpose(1, 2)) if axis == 1 else (query, key)


def _is_covered(query: Any, key: Any, cos: Any, sin: Any, *, is_partial: bool) -> bool:
    """Tell whether the shapes and precisions are those that were compared."""
    if not all(isinstance(one, Tensor) for one in (query, key, cos, sin)):
        return False
    width = query.shape[-1]
    return (
        query.dim() == key.dim() == 4
        and cos.dim() == sin.dim() == 3
        and query.dtype == key.dtype == cos.dtype == sin.dtype
        and key.shape[-1] == width
        and cos.shape == sin.shape
        and (cos.shape[-1] == width or (is_partial and cos.shape[-1] < width))
        and not (cos.requires_grad or sin.requires_grad)
    )


@torch.no_grad()
def _is_same(own: Apply, turned_width: int) -> bool:
    """Compare on random numbers, cosine and sine among them: no angle could hide a difference."""
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, turned_width), (2, 5, turned_width))
    )
    for query_, key_, axis in (
        (query, key, 1),
        (query.transpose(1, 2), key.transpose(1, 2), 2),
    ):
        ours = rotate(query_, key_, cos, sin, axis)
        try:
            theirs = own(query_, key_, cos, sin, unsqueeze_dim=axis)
            pairs = list(zip(ours, theirs, strict=True))
            if not all(torch.allclose(*pair, rtol=0, atol=TOLERANCE) for pair in pairs):
                return False
        except Exception:  # it takes other arguments, or gives other shapes
            return False
    return True
