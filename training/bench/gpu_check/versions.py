"""Versions, capability, and the device's measured rate of matrix products."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import asdict

import torch

from .record import Figures, Record
from .scale import Scale

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "flash_attn", "flash_attn_interface")
LEAST_SECONDS = 0.3


def run(record: Record, scale: Scale) -> None:
    """Record what everything else depends on."""
    record.measure("packages", {"python": platform.python_version()} | _packages())
    with record.attempt("device"):
        record.measure("device", _device(scale))
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if not scale.has_gpu:  # a CPU without 16-bit units emulates them for minutes
        kinds = {"float32": torch.float32}
    for name, dtype in kinds.items():
        with record.attempt(f"matrix products, {name}"):
            rate = matrix_tflops(scale, dtype)
            record.measure(f"matrix products, {name}", {"TFLOP/s": rate})


def matrix_tflops(scale: Scale, dtype: torch.dtype) -> float:
    """Return the rate of large square matrix products, in TFLOP/s."""
    side = scale.matrix_side
    a, b = (torch.randn(side, side, device=scale.device).to(dtype) for _ in range(2))
    for _ in range(3):
        _ = a @ b
    count, elapsed = 4, 0.0
    while elapsed < (LEAST_SECONDS if scale.has_gpu else 0.01):
        count *= 2
        wait(scale)
        start = time.perf_counter()
        for _ in range(count):
            _ = a @ b
        wait(scale)
        elapsed = time.perf_counter() - start
    return 2 * side**3 * count / elapsed / 1e12


def wait(scale: Scale) -> None:
    """Wait until the device has done what was asked of it."""
    if scale.has_gpu:
        torch.cuda.synchronize()


def _packages() -> Figures:
    versions: Figures = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _device(scale: Scale) -> Figures:
    from lora_trainer.machine import read_machine

    machine = read_machine()
    if not scale.has_gpu:
        return {"CPU cores": machine.cores, "system": machine.system}
    properties = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GB": properties.total_memory / 1e9,
        "driver": machine.driver,
        "CUDA": str(torch.version.cuda),
        "cuDNN": int(cudnn) if cudnn else 0,
        "GPUs": len(asdict(machine)["gpus"]),
    }
