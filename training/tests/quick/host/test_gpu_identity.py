"""Which GPUs a run may use, by a stand-in for NVML: indices, UUIDs and MIG slices."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from lora_trainer.machine import read_machine
from lora_trainer.serve.gauges import read_gpus

GB = 1 << 30
SLICE = "MIG-5c8d0b1f-1111-5555-9999-aaaaaaaaaaaa"


class Nvml:
    """Three GPUs on the bus; the last one has a MIG slice of 10 GB."""

    NVML_TEMPERATURE_GPU = 0
    uuids = ("GPU-aaaa0000-01", "GPU-aaaa1111-02", "GPU-bbbb0000-03")
    memory = (80, 40, 24)

    class NVMLError(Exception):
        pass

    def nvmlInit(self):  # noqa: N802
        return None

    nvmlShutdown = nvmlInit  # noqa: N815

    def __getattr__(self, name: str):
        def answer(*arguments):
            handle = arguments[0] if arguments else None
            if name == "nvmlDeviceGetHandleByUUID":
                if handle != SLICE:
                    raise self.NVMLError(name)
                return "slice"
            if name == "nvmlDeviceGetCudaComputeCapability" and handle == "slice":
                raise self.NVMLError("not for MIG")
            is_slice = handle == "slice"
            number = handle if isinstance(handle, int) else 0
            return {
                "nvmlDeviceGetCount": 3,
                "nvmlDeviceGetHandleByIndex": handle,
                "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": 2,
                "nvmlDeviceGetUUID": SLICE if is_slice else self.uuids[number].encode(),
                "nvmlDeviceGetName": "slice" if is_slice else f"GPU {number}",
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(
                    used=GB, total=(10 if is_slice else self.memory[number]) * GB
                ),
                "nvmlDeviceGetCudaComputeCapability": (8, number),
                "nvmlSystemGetDriverVersion": "580.1",
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=1),
                "nvmlDeviceGetTemperature": 40,
                "nvmlDeviceGetPowerUsage": 1000,
            }[name]

        return answer


@pytest.fixture(autouse=True)
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-aaaa1111-02", [1]),
        ("GPU-bbbb,0", [2, 0]),
        ("GPU-aaaa", []),  # two begin so
        ("GPU-cccc", []),
        ("1,7,0", [1]),  # CUDA stops at the first name that fits nothing
        ("1,1", []),
        ("0, 1", [0, 1]),
        ("nonsense", []),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_see(
    names: str | None, indices: list[int], nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    gpus = read_machine().gpus
    assert [gpu.index for gpu in gpus] == indices
    assert [gpu.memory_bytes for gpu in gpus] == [nvml.memory[i] * GB for i in indices]
    if names not in ("", "-1"):  # the gauges do not ask NVML then
        assert [one.index for one in read_gpus(nvml)] == indices


def test_a_mig_slice_has_its_own_memory_and_its_gpus_capability(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SLICE)
    (gpu,) = read_machine().gpus
    assert (gpu.index, gpu.memory_bytes, gpu.capability) == (2, 10 * GB, (8, 2))
    (reading,) = read_gpus(nvml)
    assert reading.memory_total_bytes == 10 * GB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-unknown")
    assert read_machine().gpus == ()
