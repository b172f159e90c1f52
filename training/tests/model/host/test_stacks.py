"""A GPU that the installed stack does not serve ends the start; NVML and torch are played."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lora_trainer.commands import check
from lora_trainer.config.settings import resolve
from lora_trainer.errors import UnavailableError
from lora_trainer.machine import read_machine
from lora_trainer.model import stacks
from lora_trainer.model.backend import usable_machine

NVML_ERROR = type("NVMLError", (Exception,), {})


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that makes NVML list GPUs, by a driver and their compute capabilities."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LORA_STACK", raising=False)

    def play(driver: str, *capabilities: tuple[int, int]) -> None:
        nvml = ModuleType("pynvml")
        nvml.__dict__.update(
            NVMLError=NVML_ERROR,
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlSystemGetDriverVersion=lambda: driver,
            nvmlDeviceGetCount=lambda: len(capabilities),
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda index: f"GPU of {capabilities[index]}",
            nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=24 << 30),
            nvmlDeviceGetCudaComputeCapability=lambda index: capabilities[index],
        )
        monkeypatch.setitem(sys.modules, "pynvml", nvml)

    return play


@pytest.mark.parametrize(
    ("stack", "driver", "capabilities", "why", "remedy"),
    [
        ("current", "535.104.05", [(8, 0)], "needs 580 or newer", "LORA_STACK=cu121"),
        ("current", "580.65.06", [(7, 0)], "supports 7.5 and newer", "LORA_STACK=cu121"),
        ("current", "470.1", [(6, 1)], "needs 580 or newer", "update the driver to 580"),
        ("cu121", "580.65.06", [(12, 0)], "is 12.0, but the stack cu121 supports 7.0", "current"),
        ("cu121", "580.65.06", [(8, 0), (6, 1)], "is 6.1", "update the driver"),
        ("cpu", "580.65.06", [(8, 0)], "its torch has no CUDA", "LORA_STACK=current"),
    ],
)  # fmt: skip
def test_gpu_that_the_stack_does_not_serve_ends_the_start(
    gpus, stack, driver, capabilities, why, remedy
):
    gpus(driver, *capabilities)
    with pytest.raises(UnavailableError, match="do not support this machine") as caught:
        stacks.check_gpus(read_machine(), stack)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 69
    assert why in problem.why
    assert remedy in problem.remedy
    assert "--cpu" in problem.remedy


@pytest.mark.parametrize(
    ("stack", "driver", "capability"),
    [("current", "580.65.06", (12, 0)), ("cu121", "525.60.13", (7, 0)), ("cu121", "", (9, 0))],
)
def test_gpu_that_the_stack_serves_is_used(gpus, stack, driver, capability):
    gpus(driver, capability)
    stacks.check_gpus(read_machine(), stack)


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("LORA_STACK", "cpu")])
def test_gpu_that_was_put_aside_hinders_nothing(gpus, monkeypatch, name, value):
    gpus("470.1", (6, 1))
    monkeypatch.setenv(name, value)
    stacks.check_gpus(read_machine(), "cpu")


def test_preflight_stops_before_anything_else_is_read(gpus, monkeypatch, tmp_path):
    gpus("470.1", (6, 1))
    settings = resolve(None, {}, ["--output_dir", str(tmp_path / "out")])
    with pytest.raises(UnavailableError, match="do not support this machine"):
        check.preflight(settings)


def test_gpu_that_torch_does_not_find_is_no_reason_to_train_on_the_cpu(gpus, monkeypatch):
    gpus("580.65.06", (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="the GPU cannot be used"):
        usable_machine(read_machine())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_machine(read_machine()).device == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert usable_machine(read_machine()).device == "cpu"
