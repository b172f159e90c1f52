"""Which kernel computes attention over concatenated examples: flash-attn's or PyTorch's own.

flash-attn 2 (package `flash_attn`) needs compute capability 8.0, flash-attn 3 (package
`flash_attn_interface`) needs 9.0; both compute in half precision. No stack ships either. Where
neither can be used, PyTorch's own attention runs an example at a time, through the flash
kernel that PyTorch itself has for GPUs and CPUs where the model lets it. All are exact.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, TrainerError
from ..machine import Machine

if TYPE_CHECKING:
    import torch

STRICT = "flash-attn"
REMEDY = "--use_flash_attention true takes the fastest kernel that this machine has"
OLDEST = (2, 6)  # the first release of version 2 that takes every argument we give
# torch.nn.attention.SDPBackend, which torch 2.1 has under another name.
BACKENDS = {1: "flash", 2: "memory-efficient", 3: "cuDNN"}

Asked = bool | Literal["auto", "flash-attn"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One of flash-attn's packages."""

    name: str
    module: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel to use, None for PyTorch's own; then why flash-attn's is not."""

    kernel: Kernel | None
    why: str = ""


FLASH_2 = Kernel("flash-attn 2", "flash_attn")
FLASH_3 = Kernel("flash-attn 3", "flash_attn_interface")
AMPERE = (8, 0)
WIDEST = 256  # numbers a head, of either version
USUAL_WIDTH = 64  # of a head, for a model whose config does not give it
HOPPER = 9  # flash-attn 3 is written for it; on later GPUs version 2 runs


def choose(
    asked: Asked, machine: Machine, precision: str, *, model: Any = None, where: str = ""
) -> Choice:
    """Return the kernel to use. `model` is the base model's config.

    Raises:
        ConfigError: flash-attn is insisted on, and cannot be used.
    """
    if asked is False:
        return Choice(None, "it is switched off")
    kernel, why = _find(machine, precision)
    if kernel is not None and (width := _head_width(model)) > WIDEST:
        why = f"{kernel.name} takes heads of up to {WIDEST}, this model's have {width}"
        kernel = None
    if kernel is None and asked == STRICT:
        raise refusal(why, where)
    return Choice(kernel, why)


def refusal(why: str, where: str = "") -> TrainerError:
    """Return the error of flash-attn being insisted on in vain."""
    return ConfigError.of(
        "flash-attn cannot be used here",
        where=where or f"use_flash_attention: {STRICT}",
        why=why,
        remedy=REMEDY,
    )


def _head_width(model: Any) -> int:
    """Return the numbers in a head; 0 where the config does not give them."""
    if own := getattr(model, "head_dim", None):
        return int(own)
    width, heads = (getattr(model, n, None) for n in ("hidden_size", "num_attention_heads"))
    return int(width // heads) if width and heads else 0


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
        return None, "the Python package flash-attn is not installed"
    version = importlib.metadata.version(FLASH_2.module)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return None, f"flash-attn {version} is too old, 2.6 is needed"
    return FLASH_2, ""


def pytorch_kernel(device: str, dtype: torch.dtype, model: Any) -> str:
    """Return which kernel PyTorch's attention runs for this model: asked of PyTorch, not assumed.

    `model` must not cap its attention scores.
    """
    import torch

    width = _head_width(model) or USUAL_WIDTH
    part = torch.zeros(1, 1, 16, width, dtype=dtype, device=device, requires_grad=True)
    try:
        number = torch._fused_sdp_choice(part, part, part, None, 0.0, True)
    except (AttributeError, RuntimeError, TypeError):  # not PyTorch's public interface
        return "sdpa"
    return f"sdpa ({BACKENDS.get(int(number), 'math')})"


def described(choice: Choice, own: str) -> str:
    """Return the plan's word for attention over concatenated examples; `own` is PyTorch's."""
    return f"packed {choice.kernel.name if choice.kernel is not None else own}"


def reason(asked: Asked, choice: Choice) -> str:
    """Return why the attention that is used is not flash-attn's, where the user asked for flash."""
    if asked is not True or choice.kernel is not None:
        return ""
    return f"use_flash_attention: PyTorch's own attention is used: {choice.why}"


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
