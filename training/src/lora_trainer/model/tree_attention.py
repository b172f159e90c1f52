"""Attention over a row whose examples share their beginnings (`data/prefixes.py`), on a CPU.

A segment attends causally to itself, and the tokens that continue it to all of it. PyTorch's kernel
computes each of the two with the logarithm of the sum of its exponentials, by which results over
different keys add up. Given the added-up ones, its backward pass computes the gradients of each
piece: no mask, no scores and no copy of a key is made.

Legend: H heads (fewer for keys and values), T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.prefixes import Segment

HAS_CPU_OPERATOR = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def attend_tree(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float | None
) -> Tensor:
    """Return attention (1, T, H, D) of a query, key and value (1, H, T, D) of one precision."""
    output: Tensor = _TreeAttention.apply(query, key, value, segments, scaling)
    return output


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        scaling: float | None,
    ) -> Tensor:
        own = [
            _forward(True, scaling, *(_cut(t, one.start, one.stop) for t in (query, key, value)))
            for one in segments
        ]
        output, sums = (torch.cat([pair[i].transpose(1, 2) for pair in own], 1) for i in (0, 1))
        merged, sums = output.to(sums.dtype).transpose(1, 2), sums.transpose(1, 2)
        for one in segments:
            if one.end > one.stop:
                before, before_sums = _forward(
                    False,
                    scaling,
                    _cut(query, one.stop, one.end),
                    *(_cut(t, one.start, one.stop) for t in (key, value)),
                )
                here, here_sums = (_cut(t, one.stop, one.end) for t in (merged, sums))
                total = torch.logaddexp(here_sums, before_sums)
                here.mul_((here_sums - total).exp_()[..., None])
                here.addcmul_(before, before_sums.sub_(total).exp_()[..., None])
                here_sums.copy_(total)
        output = merged.transpose(1, 2).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.segments, ctx.scaling = segments, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        queries = (gradients[0].transpose(1, 2), query, output.transpose(1, 2), sums)
        own = [
            _backward(
                True, ctx.scaling, *(_cut(t, one.start, one.stop) for t in (*queries, key, value))
            )
            for one in ctx.segments
        ]
        whole = [torch.cat([three[i].transpose(1, 2) for three in own], 1) for i in range(3)]
        query_gradient, *others = (one.transpose(1, 2) for one in whole)
        for one in ctx.segments:
            if one.end > one.stop:
                to_query, *to_others = _backward(
                    False,
                    ctx.scaling,
                    *(_cut(t, one.stop, one.end) for t in queries),
                    *(_cut(t, one.start, one.stop) for t in (key, value)),
                )
                _cut(query_gradient, one.stop, one.end).add_(to_query)
                for gradient, part in zip(others, to_others, strict=True):
                    _cut(gradient, one.start, one.stop).add_(part)
        return query_gradient, *others, None, None


def _cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return some tokens of a tensor (1, H, T, ...)."""
    return tensor[:, :, start:stop]


def _forward(
    is_causal: bool, scaling: float | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return attention (1, H, T, D), and the logarithms of the sums of exponentials (1, H, T)."""
    if HAS_CPU_OPERATOR:
        operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        made = operator(query, key, value, 0.0, is_causal, scale=scaling)
    else:
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        made = operator(query, key, value, 0.0, is_causal, False, scale=scaling)
    return made[0], made[1]


def _backward(
    is_causal: bool,
    scaling: float | None,
    gradient: Tensor,
    query: Tensor,
    output: Tensor,
    sums: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, from attention over these keys and others."""
    known = (gradient, query, key, value, output, sums)
    made: tuple[Tensor, Tensor, Tensor]
    if HAS_CPU_OPERATOR:
        operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        made = operator(*known, 0.0, is_causal, scale=scaling)
    else:
        # A CPU uses neither the GPU kernel's limits nor its random state.
        operator = torch.ops.aten._scaled_dot_product_flash_attention_backward
        none = query.new_empty(0)
        made = operator(*known, none, none, 0, 0, 0.0, is_causal, none, none, scale=scaling)
    return made
