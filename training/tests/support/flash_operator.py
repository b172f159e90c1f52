"""PyTorch's flash attention operator on the CPU, by its documentation: real ones are CUDA's alone.

With it, `torch.nn.attention.varlen` (2.13) and `aten::_flash_attention_forward` (2.1) run here as
they are, their autograd included. Legend: T tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

IS_FIRST = torch.__version__.startswith("2.1.")


@contextmanager
def on_the_cpu() -> Iterator[list[dict[str, Any]]]:
    """Register the operator for CPU tensors; gives a list that each call is added to."""
    calls: list[dict[str, Any]] = []

    def forward(q, k, v, starts, _starts_k, longest, _longest_k, dropout, causal, _debug, **more):
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q)
        assert longest == int((starts[1:] - starts[:-1]).max()) and dropout == 0
        assert q.shape[1] == k.shape[1] or not IS_FIRST
        window = (more.get("window_size_left"), more.get("window_size_right"))
        calls.append({"starts": starts, "causal": causal, "window": window, **more})
        out = torch.empty_like(q)
        for span, weights, _, value in _examples(q, k, v, starts, causal, more):
            out[span] = (weights @ value).transpose(0, 1).to(q.dtype)
        sums = torch.zeros(q.shape[1], len(q))
        empty = torch.zeros(0)
        return (
            out,
            sums,
            torch.zeros((), dtype=torch.long),
            torch.zeros((), dtype=torch.long),
            empty,
        )

    def backward(grad, q, k, v, _out, _sums, starts, *rest, **more):
        causal = rest[4]
        gradients = [torch.zeros_like(part) for part in (q, k, v)]
        scale = q.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
        heads = k.shape[1]
        for span, weights, key, value in _examples(q, k, v, starts, causal, more):
            above = grad[span].transpose(0, 1)
            from_weights = above @ value.transpose(1, 2)
            scores = weights * (from_weights - (from_weights * weights).sum(-1, keepdim=True))
            query = q[span].transpose(0, 1)
            gradients[0][span] = (scores @ key * scale).transpose(0, 1)
            for into, part in (
                (1, scores.transpose(1, 2) @ query * scale),
                (2, weights.transpose(1, 2) @ above),
            ):
                shared = part.unflatten(0, (heads, -1)).sum(1)
                gradients[into][span] = shared.transpose(0, 1)
        calls.append({"backward": True})
        return tuple(gradients)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        if hasattr(library, "_destroy"):
            library._destroy()
        del library


def _examples(q, k, v, starts, causal, more):
    """Give each example's span, its attention weights (H, T, T), and keys and values per head."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
    left = -1 if more.get("window_size_left") is None else more["window_size_left"]
    right = -1 if more.get("window_size_right") is None else more["window_size_right"]
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        span = slice(begin, end)
        query = q[span].transpose(0, 1)
        key, value = (p[span].repeat_interleave(groups, dim=1).transpose(0, 1) for p in (k, v))
        index = torch.arange(end - begin)
        ahead = index[None] - index[:, None]
        is_seen = torch.ones_like(ahead, dtype=torch.bool)
        if causal or right >= 0:
            is_seen &= ahead <= max(right, 0)
        if left >= 0:
            is_seen &= ahead >= -left
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(~is_seen, float("-inf"))
        yield span, scores.softmax(-1), key, value
