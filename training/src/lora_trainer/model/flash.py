"""Choose the kernel for attention over concatenated examples: flash-attn's or PyTorch's.

flash-attn 2 (package `flash_attn`) needs compute capability 8.0, flash-attn 3 (package
`flash_attn_interface`) needs 9.0. No stack ships either, and none needs it: PyTorch carries
a kernel for variable lengths (`varlen.py`). All of these compute in half precision, on GPUs.
Elsewhere PyTorch's scaled dot-product attention runs an example at a time. All are exact.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, TrainerError
from ..machine import Machine

if TYPE_CHECKING:
    import torch

STRICT = "flash-attn"
REMEDY = "--use_flash_attention true uses the fastest kernel available on this machine"
OLDEST = (2, 6)  # the first release of version 2 that takes every argument we give
# torch.nn.attention.SDPBackend, which torch 2.1 has under another name.
BACKENDS = {1: "flash", 2: "memory-efficient", 3: "cuDNN"}

Asked = bool | Literal["auto", "flash-attn"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel for variable lengths, by the module that has it, and what it takes."""

    name: str
    module: str
    has_window: bool = True
    has_softcap: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel to use, None for an example at a time; why there is no better one.

    `limit` says what of this model the kernel leaves to an example at a time.
    """

    kernel: Kernel | None
    why: str = ""
    has_gpu: bool = False
    limit: str = ""


FLASH_2 = Kernel("flash-attn 2", "flash_attn")
FLASH_3 = Kernel("flash-attn 3", "flash_attn_interface")
PYTORCH = Kernel("PyTorch varlen_attn", "torch.nn.attention.varlen", has_softcap=False)
PYTORCH_1 = Kernel("PyTorch flash attention 1", "torch", has_window=False, has_softcap=False)
CUDNN_OFF = "cuDNN off"
AMPERE = (8, 0)
WIDEST = 256  # numbers a head, of either version
USUAL_WIDTH = 64  # of a head, for a model whose config does not give it
HOPPER = 9  # flash-attn 3 is written for it; on later GPUs version 2 runs


def choose(
    asked: Asked, machine: Machine, precision: str, *, model: Any = None, where: str = ""
) -> Choice:
    """Return the kernel to use. `model` is the base model's config.

    Raises:
        ConfigError: flash-attn is required, and cannot be used.
    """
    if asked is False:
        return Choice(None, "it is switched off")
    kernel, why = _find(machine, precision)
    if kernel is not None and (width := _head_width(model)) > WIDEST:
        why = f"{kernel.name} supports head widths up to {WIDEST}, this model has {width}"
        kernel = None
    if dropout := _attention_dropout(model):
        why = (
            "variable-length kernels do not support attention dropout, and attention_dropout is "
            f"{dropout:g}"
        )
        kernel = None
    if kernel is None and asked == STRICT:
        raise refusal(why, where)
    if kernel is None and machine.has_gpu and precision != "float32" and not dropout:
        kernel, own = _find_pytorch(machine, precision, model)
        why = f"{why}; {own}" if own else why
    return Choice(kernel, why, machine.has_gpu, _limit(kernel, model))


def refusal(why: str, where: str = "") -> TrainerError:
    """Return the error of flash-attn being required where it cannot be used."""
    return ConfigError.of(
        "flash-attn cannot be used here",
        where=where or f"use_flash_attention: {STRICT}",
        why=why,
        remedy=REMEDY,
    )


def caps_scores(model: Any) -> bool:
    """Return whether a model caps its attention scores, which no kernel of PyTorch's does."""
    return bool(getattr(model, "attn_logit_softcapping", None))


def _head_width(model: Any) -> int:
    """Return the numbers in a head; 0 where the config does not give them."""
    if own := getattr(model, "head_dim", None):
        return int(own)
    width, heads = (getattr(model, n, None) for n in ("hidden_size", "num_attention_heads"))
    return int(width // heads) if width and heads else 0


def _find(machine: Machine, precision: str) -> tuple[Kernel | None, str]:
    if not machine.has_gpu:
        return None, "flash-attn only runs on NVIDIA GPUs, and no GPU is available"
    weakest = min(machine.gpus, key=lambda gpu: gpu.capability)
    if weakest.capability < AMPERE:
        has = ".".join(str(part) for part in weakest.capability)
        return None, f"flash-attn 2 needs compute capability 8.0, {weakest.name} has {has}"
    if precision == "float32":
        return None, "flash-attn requires half precision, and training uses float32"
    if weakest.capability[0] == HOPPER and importlib.util.find_spec(FLASH_3.module) is not None:
        return FLASH_3, ""
    if importlib.util.find_spec(FLASH_2.module) is None:
        return None, "the Python package flash-attn is not installed"
    version = importlib.metadata.version(FLASH_2.module)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return None, f"flash-attn {version} is too old, 2.6 is required"
    return FLASH_2, ""


def _attention_dropout(model: Any) -> float:
    names = ("attention_dropout", "attn_pdrop")
    return max(float(getattr(model, name, None) or 0) for name in names)


def _limit(kernel: Kernel | None, model: Any) -> str:
    window = getattr(model, "sliding_window", None)
    if kernel is None or kernel.has_window or not window:
        return ""
    return (
        f"{kernel.name} does not support windows: if an example is longer than {window} tokens, "
        "attention runs one example at a time"
    )


def _find_pytorch(machine: Machine, precision: str, model: Any) -> tuple[Kernel | None, str]:
    from . import varlen

    kernel = {kernel.module: kernel for kernel in (PYTORCH, PYTORCH_1)}.get(varlen.of_pytorch())
    if kernel is None:
        return None, "this release of PyTorch has no known variable-length kernel"
    if caps_scores(model):
        return None, "PyTorch's kernels do not support capped attention scores"
    width = _head_width(model) or USUAL_WIDTH
    for gpu in machine.gpus:
        if why := varlen.unfit(kernel.module, gpu.capability, precision, width):
            return None, f"{kernel.name} cannot be used on {gpu.name}: {why}"
    return kernel, ""


def pytorch_kernel(device: str, dtype: torch.dtype, model: Any) -> str:
    """Return which kernel PyTorch's attention runs for this model: asked of PyTorch, not assumed.

    `model` must not cap its attention scores.
    """
    import torch

    has_cudnn = switch_cudnn_off() and device.startswith("cuda")
    width = _head_width(model) or USUAL_WIDTH
    part = torch.zeros(1, 1, 16, width, dtype=dtype, device=device, requires_grad=True)
    try:
        number = torch._fused_sdp_choice(part, part, part, None, 0.0, True)
    except (AttributeError, RuntimeError, TypeError):  # not PyTorch's public interface
        return "sdpa"
    used = BACKENDS.get(int(number), "math")
    return f"sdpa ({used}{f', {CUDNN_OFF}' if has_cudnn else ''})"


def switch_cudnn_off() -> bool:
    """Keep PyTorch's attention from cuDNN's in this process; return whether it has cuDNN's.

    It is preferred on compute capability 9.0 and 10.0, and builds a plan for each new shape.
    Lengths differ from micro-batch to micro-batch, and with each token that is generated.
    """
    import torch

    switch = getattr(torch.backends.cuda, "enable_cudnn_sdp", None)  # torch 2.1 has none
    if switch is None:
        return False
    switch(False)
    return True


def described(choice: Choice, own: str) -> str:
    """Return the plan's word for attention over concatenated examples; `own` is PyTorch's."""
    if choice.kernel is None:
        return f"packed {own}"
    return f"packed {choice.kernel.name}{f' ({CUDNN_OFF})' if CUDNN_OFF in own else ''}"


def reason(asked: Asked, choice: Choice) -> str:
    """Return why attention runs an example at a time, where the user or a GPU expects better."""
    if choice.kernel is not None:
        return choice.limit
    if asked is False or not (asked is True or choice.has_gpu):
        return ""
    return f"use_flash_attention: PyTorch's own attention runs one example at a time: {choice.why}"


def varying(choice: Choice, machine: Machine, precision: str) -> str:
    """Return the plan's warning of gradients whose last digits vary, which PyTorch 2.1 hides.

    Its flash attention splits the backward pass as it sees fit and adds the pieces up in any
    order, in deterministic mode too (num_splits is 0, a constant, in _flash_attention_backward).
    """
    from . import varlen

    is_flash = any(gpu.capability >= (7, 5) for gpu in machine.gpus) and precision != "float32"
    if (
        not is_flash
        or choice.kernel in (FLASH_2, FLASH_3)
        or varlen.of_pytorch() != PYTORCH_1.module
    ):
        return ""
    return (
        "a resumed run may differ in its last digits: flash attention in PyTorch 2.1 is not "
        "deterministic"
    )


class VariableLength:
    """A kernel for variable lengths, as `PackedAttention` calls it.

    Legend: T tokens of all examples, H heads (fewer for keys and values), D head width.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._spans: tuple[Any, Any] = ((), None)

    def takes(self, window: int | None, softcap: float | None) -> bool:
        """Return whether the kernel computes this attention."""
        return (window is None or self.kernel.has_window) and (
            softcap is None or self.kernel.has_softcap
        )

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

        Kernels take half precision: float32 norms make queries and keys that are float32.
        """
        import torch

        from . import varlen

        dtype = query_THD.dtype
        if torch.float32 in (dtype, key_THD.dtype, value_THD.dtype):
            half = torch.float16 if value_THD.dtype == torch.float16 else torch.bfloat16
            query_THD, key_THD, value_THD = (
                part.to(half) for part in (query_THD, key_THD, value_THD)
            )
        output_THD = varlen.attend(
            self.kernel.module, query_THD, key_THD, value_THD,
            self._spans_of(lengths, query_THD.device),
            scaling=scaling, window=window, softcap=softcap,
        )  # fmt: skip
        return output_THD.to(dtype)

    def _spans_of(self, lengths: Sequence[int], device: Any) -> Any:
        """Return where the examples are: sent to the device once a micro-batch, for all layers."""
        import numpy as np
        import torch

        from .transfer import send
        from .varlen import Spans

        key = (tuple(lengths), device)
        if self._spans[0] != key:
            starts = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
            self._spans = (key, Spans(send(starts, device), max(lengths)))
        return self._spans[1]
