"""Which precision this machine computes fast in: measured, never assumed.

bfloat16 on a CPU without native support is emulated, hundreds of times slower than
float32, and nothing says so but a clock.
"""

from __future__ import annotations

import time
import warnings
from typing import Literal

import torch

from ..machine import Machine
from ..plan import Precision
from . import stacks

# A product this large takes 0.1 ms in float32 on one core, and 40 ms where emulated.
MEASURED_SIZE = 128
MOST_SLOWER = 1.5


def device_of(machine: Machine) -> Literal["cpu", "cuda"]:
    """Return what training computes on: the GPU, wherever the machine has one.

    Raises:
        UnavailableError: it has one, and torch cannot use it.
    """
    if not machine.has_gpu:
        return "cpu"
    why = ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        is_usable = torch.cuda.is_available()
    if is_usable:
        return "cuda"
    if said:
        why = str(said[-1].message).splitlines()[0]
    raise stacks.unusable(machine, why)


def choose_precision(asked: bool | Literal["auto"], device: str) -> tuple[Precision, str]:
    """Return the precision to train in, and why where it is not what was asked for."""
    if device == "cuda":
        is_native = torch.cuda.get_device_capability()[0] >= 8
        if is_native:
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


def bfloat16_slowness() -> float:
    """Return how many times longer a bfloat16 matrix product takes than a float32 one."""
    return _product_seconds(torch.bfloat16) / _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    matrix = torch.full((MEASURED_SIZE, MEASURED_SIZE), 0.5, dtype=dtype)
    _ = matrix @ matrix
    best = float("inf")
    for _repeat in range(3):
        start = time.perf_counter()
        _ = matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return best
