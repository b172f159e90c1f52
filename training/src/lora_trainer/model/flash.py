"""flash-attn: whether it can be used here, and its kernel over concatenated examples.

flash-attn 2 (package `flash_attn`) needs compute capability 8.0, flash-attn 3 (package
`flash_attn_interface`) needs 9.0; both compute in half precision. Where neither is there,
PyTorch's own attention runs an example at a time. Nothing here imports torch by itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from ..machine import Machine

REMEDY = "--use_flash_attention auto"
OLDEST = (2, 6)  # the first release of version 2 that takes every argument we give
INSTALL = "pip install flash-attn --no-build-isolation"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One of flash-attn's packages."""

    name: str
    module: str


FLASH_2 = Kernel("flash-attn 2", "flash_attn")
FLASH_3 = Kernel("flash-attn 3", "flash_attn_interface")
AMPERE = (8, 0)
WIDEST = 256  # numbers a head, of either version
HOPPER = 9  # flash-attn 3 is written for it; on later GPUs version 2 runs


def choose(
    asked: bool | Literal["auto"],
    machine: Machine,
    precision: str,
    *,
    model: Any = None,
    where: str = "",
) -> Kernel | None:
    """Return the kernel to use; None for PyTorch's own. `model` is the base model's config.

    Raises:
        ConfigError: it is insisted on, and cannot be used; the reason by name.
    """
    if asked is False:
        return None
    kernel, why = _find(machine, precision)
    if kernel is not None and (width := _head_width(model)) > WIDEST:
        why = f"{kernel.name} takes heads of up to {WIDEST}, this model's have {width}"
        kernel = None
    if kernel is None and asked is True:
        raise ConfigError.of(
            "use_flash_attention cannot be true here",
            where=where or "use_flash_attention: true",
            why=why,
            remedy=REMEDY,
        )
    return kernel


def _head_width(model: Any) -> int:
    if model is None:
        return 0
    own = getattr(model, "head_dim", None)
    return int(own or model.hidden_size // model.num_attention_heads)


def _find(machine: Machine, precision: str) -> tuple[Kernel | None, str]:
    if not machine.has_gpu:
        return None, "flash-attn runs on NVIDIA GPUs alone, and no GPU can be used"
    weakest = min(machine.gpus, key=lambda gpu: gpu.capability)
    if weakest.capability < AMPERE:
        has = ".".join(str(part) for part in weakest.capability)
        return None, f"flash-attn 2 needs compute capability 8.0, {weakest.name} has {has}"
    if precision == "float32":
        return None, "flash-attn computes in half precision, and float32 is what is trained in"
    if weakest.capability[0] == HOPPER and importlib.util.find_spec(FLASH_3.module) is not None:
        return FLASH_3, ""
    if importlib.util.find_spec(FLASH_2.module) is None:
        return None, f"the Python package flash-attn is not installed: {INSTALL}"
    version = importlib.metadata.version(FLASH_2.module)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return None, f"flash-attn {version} is too old, 2.6 is needed: {INSTALL} --upgrade"
    return FLASH_2, ""


def described(kernel: Kernel | None) -> str:
    """Return the plan's word for attention over concatenated examples."""
    return f"packed {kernel.name if kernel is not None else 'sdpa'}"


class VariableLength:
    """flash-attn's variable-length kernel, as `PackedAttention` calls it.

    Legend: T tokens of all examples, H heads (fewer for keys and values), D head width.
    """

    def __init__(self, kernel: Kernel) -> None:
        module = importlib.import_module(kernel.module)
        self.name = kernel.name
        self.function: Callable[..., Any] = module.flash_attn_varlen_func
        self._starts: tuple[tuple[int, ...], Any] = ((), None)

    def __call__(
        self,
        query_THD: Any,
        key_THD: Any,
        value_THD: Any,
        lengths: Sequence[int],
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Any:
        """Return attention inside each example (T, H, D), in the queries' precision.

        A window of w keys, the query's own among them, is (w - 1, 0) to flash-attn.
        """
        import torch

        dtype = query_THD.dtype
        if dtype == torch.float32:  # float32 norms of a quantized base make float32 queries
            query_THD, key_THD, value_THD = (
                part.to(torch.bfloat16) for part in (query_THD, key_THD, value_THD)
            )
        starts = self._starts_of(lengths, query_THD.device)
        options: dict[str, Any] = {"softcap": softcap} if softcap is not None else {}
        made = self.function(
            query_THD,
            key_THD,
            value_THD,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            deterministic=True,
            **options,
        )
        # flash-attn 3 has returned the log-sum-exp beside the output in some releases.
        return (made[0] if isinstance(made, tuple) else made).to(dtype)

    def _starts_of(self, lengths: Sequence[int], device: Any) -> Any:
        """Return where the examples begin, and the end: int32, one more than examples."""
        import torch

        key = tuple(lengths)
        if self._starts[0] != key or self._starts[1].device != device:
            starts = [0]
            for length in lengths:
                starts.append(starts[-1] + length)
            self._starts = (key, torch.tensor(starts, dtype=torch.int32, device=device))
        return self._starts[1]
