"""A common interface to variable-length attention kernels: flash-attn's and PyTorch's.

flash-attn is a package of its own, in two versions. PyTorch carries its kernel too, for GPUs:
`torch.nn.attention.varlen` from 2.11 on, with windows and grouped heads; in 2.1 flash attention
1 behind an operator, without windows, for as many key heads as query heads.

Source: pytorch/pytorch, aten/src/ATen/native/transformers/cuda: sdp_utils.cpp and flash_attn.

Legend: T tokens of all examples, H heads (fewer for keys and values), D head width.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Capability = tuple[int, int]
PYTORCH = "torch.nn.attention.varlen"
PYTORCH_1 = "torch"  # its operator, in 2.1


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the examples begin among the T tokens, and the end (int32); the longest's tokens."""

    starts: Tensor
    longest: int


def attend(
    module: str,
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    spans: Spans,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return causal attention inside each example (T, H, D) by the kernel of `module`.

    A window of w keys, the query's own among them, is (w - 1, 0) to all kernels.
    """
    before = -1 if window is None else window - 1
    starts, longest = spans.starts, spans.longest
    if module == PYTORCH_1:
        assert window is None and softcap is None
        groups = query_THD.shape[1] // key_THD.shape[1]
        if groups > 1:
            key_THD, value_THD = (
                part.repeat_interleave(groups, dim=1) for part in (key_THD, value_THD)
            )
        result = torch.ops.aten._flash_attention_forward(
            query_THD.contiguous(), key_THD, value_THD, starts, starts, longest, longest,
            0.0, True, False, scale=scaling,
        )  # fmt: skip
    elif module == PYTORCH:
        assert softcap is None
        is_grouped = query_THD.shape[1] != key_THD.shape[1]
        # 2.11 takes fewer key heads than query heads without being told.
        grouped: Any = {"enable_gqa": True} if is_grouped and _tells_groups() else {}
        result = _function(module, "varlen_attn")(
            query_THD, key_THD, value_THD, starts, starts, longest, longest,
            scale=scaling, window_size=(before, 0), **grouped,
        )  # fmt: skip
    else:
        result = _function(module, "flash_attn_varlen_func")(
            query_THD, key_THD, value_THD,
            cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (before, 0),
            deterministic=True,
            **({"softcap": softcap} if softcap is not None else {}),
        )  # fmt: skip
    # The log-sum-exp is beside the output in some releases of flash-attn 3 too.
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def of_pytorch() -> str:
    """Return the module of PyTorch's kernel, empty where this release has none that is known."""
    if torch.__version__.startswith("2.1."):
        return PYTORCH_1
    try:
        parameters = inspect.signature(_function(PYTORCH, "varlen_attn")).parameters
    except (ImportError, AttributeError):
        return ""
    return PYTORCH if {"window_size", "scale"} <= set(parameters) else ""


@cache
def _tells_groups() -> bool:
    return "enable_gqa" in inspect.signature(_function(PYTORCH, "varlen_attn")).parameters


def unfit(module: str, capability: Capability, precision: str, width: int) -> str:
    """Return why PyTorch's kernel cannot train heads of this width on a GPU; empty: it can."""
    has = ".".join(str(part) for part in capability)
    is_first = module == PYTORCH_1
    least = (7, 5) if is_first and precision == "float16" else (8, 0)
    if capability < least:
        return f"it needs compute capability {least[0]}.{least[1]} for {precision}, not {has}"
    if is_first and capability > (9, 0):
        return f"PyTorch 2.1 supports compute capability up to 9.0, not {has}"
    widest = 256
    if is_first:
        widest = 128 if capability in ((8, 0), (9, 0)) else 64
    if width > widest or width % 8:
        return (
            f"it needs a head width that is a multiple of 8 and at most {widest}, this model has "
            f"{width}"
        )
    is_small_cache = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    if is_small_cache and 192 < width <= 224:
        return f"it does not train heads of {width} on compute capability {has}"
    return ""


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)
