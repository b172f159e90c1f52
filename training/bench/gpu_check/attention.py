"""Attention over concatenated examples: each kernel's first call, steady time and error."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_trainer.machine import read_machine
from lora_trainer.model import flash
from lora_trainer.model.attention import PackedAttention

from . import criteria
from .record import Figures, Record
from .scale import Scale
from .versions import wait

ROUNDS = 5
SEGMENTS = "segments"
NO_GPU = "it only runs on GPUs"

# Lengths in tokens; queries, keys and values (1, heads, T, D) in, attention (1, T, heads, D) out.
Attend = Callable[[Sequence[int], Tensor, Tensor, Tensor], Tensor]


def run(record: Record, scale: Scale) -> None:
    """Compare the kernels on the same inputs, for each number of segments."""
    makers: dict[str, Callable[[Scale], Attend | str]] = {
        SEGMENTS: lambda _: _segments(has_cudnn=True),
        "segments, cuDNN off": lambda _: _segments(has_cudnn=False) if scale.has_gpu else NO_GPU,
        "varlen": _varlen,
        "flash-attn": _flash_attn,
    }
    for count in scale.segments:
        error_of_segments = 0.0
        inputs = _inputs(scale)
        lengths = draw_lengths(scale.attention_tokens, count, seed=count)
        exact = _results(_exactly, lengths, [part.float() for part in inputs])
        for name, make in makers.items():
            label = f"{count} segments, {name}"
            with record.attempt(label):
                attend = make(scale)
                if isinstance(attend, str):
                    record.skip(label, attend)
                    continue
                figures = _timed(attend, scale, lengths, inputs)
                error = _error(_results(attend, lengths, inputs), exact)
                figures["error"] = error
                if name == SEGMENTS:
                    error_of_segments = error
                    record.measure(label, figures)
                    continue
                record.judge(label, figures, criteria.as_segments(error, error_of_segments))


def packed(kernel: flash.VariableLength | None) -> Attend:
    """Return the package's attention with a kernel, or segment by segment without."""
    attention = PackedAttention(kernel)

    def attend(lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention.lengths = lengths
        return attention(torch.nn.Identity(), query, key, value, None)[0]

    return attend


def _segments(*, has_cudnn: bool) -> Attend:
    """Return PyTorch's own attention, an example at a time, with cuDNN's kernel or without."""
    attend = packed(None)

    def attend_by_segments(
        lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        with cudnn(is_on=has_cudnn):
            return attend(lengths, query, key, value)

    return attend_by_segments


@contextlib.contextmanager
def cudnn(*, is_on: bool) -> Iterator[None]:
    """Let PyTorch's attention use cuDNN, or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _varlen(scale: Scale) -> Attend | str:
    return packed(flash.VariableLength(flash.PYTORCH)) if scale.has_gpu else NO_GPU


def _flash_attn(scale: Scale) -> Attend | str:
    choice = flash.choose("auto", read_machine(), "bfloat16")
    if choice.kernel is None or "flash-attn" not in choice.kernel.name or not scale.has_gpu:
        return choice.why or NO_GPU
    return packed(flash.VariableLength(choice.kernel))


def _exactly(lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by PyTorch's own formula, which rounds least."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return packed(None)(lengths, query, key, value)


def draw_lengths(tokens: int, count: int, seed: int) -> list[int]:
    """Return `count` random lengths, at least 1, that add up to `tokens`."""
    draw = np.random.default_rng(seed)
    cuts = np.sort(draw.choice(np.arange(1, tokens), count - 1, replace=False))
    return [int(length) for length in np.diff([0, *cuts, tokens])]


def _inputs(scale: Scale) -> list[Tensor]:
    """Return queries, keys, values and the gradient of the output, in bfloat16."""
    torch.manual_seed(0)
    heads, fewer = scale.large.heads, scale.large.key_value_heads
    tokens, width = scale.attention_tokens, scale.attention_width
    shapes = [(1, count, tokens, width) for count in (heads, fewer, fewer)]
    shapes.append((1, tokens, heads, width))
    return [
        torch.randn(shape, device=scale.device, dtype=torch.float32).to(torch.bfloat16)
        for shape in shapes
    ]


def _results(attend: Attend, lengths: Sequence[int], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the three gradients."""
    *given, gradient = inputs
    leaves = [part.clone().requires_grad_(True) for part in given]
    output = attend(lengths, *leaves)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest relative error, by the Euclidean norm, of output and gradients."""
    pairs = zip(results, exact, strict=True)
    return max(float((one.float() - other).norm() / other.norm()) for one, other in pairs)


def _timed(attend: Attend, scale: Scale, lengths: Sequence[int], inputs: list[Tensor]) -> Figures:
    def milliseconds(given: Sequence[int]) -> float:
        wait(scale)
        start = time.perf_counter()
        _results(attend, given, inputs)
        wait(scale)
        return 1e3 * (time.perf_counter() - start)

    first = milliseconds(lengths)
    others = [
        draw_lengths(scale.attention_tokens, len(lengths), seed=1000 + seed)
        for seed in range(ROUNDS)
    ]
    return {
        "first call ms": first,
        "new lengths ms": statistics.median(milliseconds(other) for other in others),
        "steady ms": statistics.median(milliseconds(lengths) for _ in range(ROUNDS)),
    }
