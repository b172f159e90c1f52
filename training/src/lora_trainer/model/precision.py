"""Choose a precision that is fast on this machine: measured, never assumed.

GPUs from compute capability 8.0 on have units for bfloat16, those before it for float16. A CPU
without units emulates both, up to hundreds of times slower than float32, and nothing says so
but a clock. Imports no torch by itself.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ..config.schema import ModelSection
from ..machine import Machine
from ..memory_estimate import Precision

if TYPE_CHECKING:
    import torch

# A product this large takes 0.1 ms in float32 on one core, and 40 ms where emulated.
MEASURED_SIZE = 128
MOST_SLOWER = 1.5
FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability


def choose_precision(section: ModelSection, machine: Machine) -> tuple[Precision, str]:
    """Return the precision to train in, and why where it is not what was asked for.

    `machine` has the GPUs that are trained on; all of them must have the units.
    """
    if not machine.has_gpu:
        return _on_cpu(section)
    if section.fp16 is True:
        return "float16", ""
    if section.bf16 is False:
        return "float32", ""
    if min(gpu.capability for gpu in machine.gpus) >= FIRST_WITH_BFLOAT16:
        return "bfloat16", ""
    used: Precision = "float32" if section.fp16 is False else "float16"
    why = f"{used} is used: this GPU has no bfloat16 units (compute capability below 8.0)"
    return used, why if section.bf16 is True else ""


def _on_cpu(section: ModelSection) -> tuple[Precision, str]:
    """Return what was asked for where this CPU computes it about as fast as float32."""
    asked: Precision
    if section.bf16 is True:
        key, asked, slower = "bf16", "bfloat16", bfloat16_slowness()
    elif section.fp16 is True:
        key, asked, slower = "fp16", "float16", float16_slowness()
    else:
        return "float32", ""
    if slower <= MOST_SLOWER:
        return asked, ""
    why = (
        f"{asked} matrix products take {slower:.0f} times as long on this CPU, which emulates them"
    )
    if math.isinf(slower):
        why = f"this version of PyTorch does not support {asked} on a CPU"
    return "float32", f"{key} was requested, but float32 is used: {why}"


def without_float16(section: ModelSection) -> ModelSection:
    """Return the keys of a base model that overflows float16: it computes in float32."""
    return section.model_copy(update={"fp16": False, "bf16": False})


def dtype_of(precision: Precision) -> torch.dtype:
    """Return torch's type of the same name."""
    import torch

    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def bfloat16_slowness() -> float:
    """Return how many times longer a bfloat16 matrix product takes than a float32 one."""
    return _product_seconds("bfloat16") / _product_seconds("float32")


def float16_slowness() -> float:
    """Return the same for float16; infinite where the CPU's products know no float16."""
    try:
        return _product_seconds("float16") / _product_seconds("float32")
    except RuntimeError:  # torch 2.1.2
        return math.inf


def _product_seconds(precision: Precision) -> float:
    import torch

    dtype = dtype_of(precision)
    matrix = torch.full((MEASURED_SIZE, MEASURED_SIZE), 0.5, dtype=dtype)
    _ = matrix @ matrix
    best = float("inf")
    for _repeat in range(3):
        start = time.perf_counter()
        _ = matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return best
