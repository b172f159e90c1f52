"""Which precision this machine computes fast in: measured, never assumed.

bfloat16 on a CPU without native support is emulated, hundreds of times slower than
float32, and nothing says so but a clock. Imports no torch by itself.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..config.schema import ModelSection
from ..machine import Machine
from ..plan import Precision

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
    asked = section.bf16
    if machine.has_gpu:
        if min(gpu.capability for gpu in machine.gpus) >= FIRST_WITH_BFLOAT16:
            return ("float32", "") if asked is False else ("bfloat16", "")
        why = "this GPU has no bfloat16 units (compute capability below 8.0)"
        return "float32", f"float32 is used: {why}" if asked is True else ""
    if asked is not True:
        return "float32", ""
    slower = bfloat16_slowness()
    if slower <= MOST_SLOWER:
        return "bfloat16", ""
    return (
        "float32",
        f"bf16 was asked for, float32 is used: bfloat16 matrix products take {slower:.0f} times "
        "as long on this CPU, which emulates them",
    )


def dtype_of(precision: Precision) -> torch.dtype:
    """Return torch's type of the same name."""
    import torch

    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def bfloat16_slowness() -> float:
    """Return how many times longer a bfloat16 matrix product takes than a float32 one."""
    return _product_seconds("bfloat16") / _product_seconds("float32")


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
