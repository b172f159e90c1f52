"""What the machine is doing: GPUs by a stand-in for NVML, memory by made-up cgroups."""

from __future__ import annotations

import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lora_trainer.serve import gauges as hardware
from lora_trainer.serve.gauges import (
    KEPT_READINGS,
    Gauges,
    HostReading,
    Reading,
    memory_bytes,
    open_nvml,
    read_gpus,
    read_host,
)

HOST = HostReading(1, 2, 3, 4, 5, 6, 7.0)


class Nvml:
    """An NVML with two GPUs: the first tells all, the second has fallen off the bus or is old."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.is_open = False

    def __getattr__(self, name: str):
        def answer(*arguments):
            handle = arguments[0] if arguments else None
            if name == self.broken and handle in (None, 1):
                raise self.NVMLError(name)
            return {
                "nvmlDeviceGetCount": 2,
                "nvmlDeviceGetHandleByIndex": handle,
                "nvmlDeviceGetName": b"Tesla" if handle else "H100",
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=5 << 30, total=80 << 30),
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=93),
                "nvmlDeviceGetTemperature": 61,
                "nvmlDeviceGetPowerUsage": 345_600,
                "nvmlInit": setattr(self, "is_open", True) if name == "nvmlInit" else None,
                "nvmlShutdown": setattr(self, "is_open", False) if name == "nvmlShutdown" else None,
            }[name]

        return answer


def test_every_gpu_is_read():
    first, second = read_gpus(Nvml())
    assert (first.index, first.name) == (0, "H100")
    assert (first.memory_used_bytes, first.memory_total_bytes) == (5 << 30, 80 << 30)
    assert (first.utilization_percent, first.temperature_celsius) == (93, 61)
    assert first.power_watts == 345.6
    assert (second.index, second.name) == (1, "Tesla")


@pytest.mark.parametrize(
    ("broken", "left_out"),
    [
        ("nvmlDeviceGetPowerUsage", "power_watts"),
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetTemperature", "temperature_celsius"),
        ("nvmlDeviceGetMemoryInfo", "memory_used_bytes"),
    ],
)
def test_what_a_gpu_does_not_tell_is_not_guessed(broken, left_out):
    first, second = read_gpus(Nvml(broken))
    assert getattr(first, left_out) is not None
    assert getattr(second, left_out) is None
    assert second.name == "Tesla"


def test_gpu_that_is_lost_keeps_its_place():
    first, second = read_gpus(Nvml("nvmlDeviceGetHandleByIndex"))
    assert first.name == "H100"
    assert (second.index, second.name, second.memory_total_bytes) == (1, "", None)


def test_no_gpu_is_read_where_the_driver_does_not_count():
    assert read_gpus(Nvml("nvmlDeviceGetCount")) == ()
    assert read_gpus(None) == ()


def test_nvml_is_opened_unless_the_gpus_are_hidden(monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert open_nvml() is nvml
    assert nvml.is_open
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert open_nvml() is None


def test_driver_that_does_not_start_means_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("nvmlInit"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert open_nvml() is None


def test_memory_counts_against_the_limit_of_cgroup_v2(tmp_path: Path):
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 700000\ninactive_file 400000\n")
    assert memory_bytes(tmp_path) == (1_100_000, 2_000_000)


def test_memory_counts_against_the_limit_of_cgroup_v1(tmp_path: Path):
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("2000000\n")
    (folder / "memory.usage_in_bytes").write_text("1500000\n")
    (folder / "memory.stat").write_text("cache 9\ntotal_inactive_file 500000\n")
    assert memory_bytes(tmp_path) == (1_000_000, 2_000_000)


def test_memory_without_a_limit_is_the_machines(tmp_path: Path):
    (tmp_path / "memory.max").write_text("max\n")
    used, limit = memory_bytes(tmp_path)
    assert limit == psutil.virtual_memory().total
    assert 0 < used < limit


def test_limit_whose_use_cannot_be_read_is_kept(tmp_path: Path):
    (tmp_path / "memory.max").write_text("2000000\n")
    assert memory_bytes(tmp_path)[1] == 2_000_000


def test_disk_is_the_one_of_the_folder_that_will_be_made(tmp_path: Path):
    host = read_host(tmp_path / "not" / "yet")
    assert host.disk_total_bytes >= host.disk_free_bytes > 0
    assert 0 <= host.cpu_percent <= 100


def test_machine_without_shared_memory_has_none(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(hardware, "SHARED_MEMORY", tmp_path / "none")
    host = read_host(tmp_path)
    assert (host.shm_free_bytes, host.shm_total_bytes) == (None, None)


def test_readings_stay_few_and_reach_back_to_the_start(tmp_path: Path):
    gauges = Gauges(tmp_path)
    for moment in range(10 * KEPT_READINGS):
        gauges.keep(Reading(float(moment), HOST, ()))
    kept = [reading.time for reading in gauges.readings()]
    assert len(kept) <= KEPT_READINGS
    assert kept[0] == 0.0
    assert kept[-1] > 9.9 * KEPT_READINGS
    assert len({round(b - a) for a, b in pairwise(kept)}) == 1
    assert gauges.latest.time == 10 * KEPT_READINGS - 1


def test_thread_reads_at_once_and_again_and_ends(tmp_path: Path, monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gauges = Gauges(tmp_path, seconds=0.01)
    gauges.start()
    until = time.monotonic() + 30
    while len(gauges.readings()) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    gauges.stop()
    assert len(gauges.readings()) >= 3
    assert gauges.has_gpu
    assert gauges.free_disk_bytes > 0
    assert not nvml.is_open


def test_gpu_is_known_of_before_nvml_has_answered(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gauges = Gauges(tmp_path)
    monkeypatch.setattr(hardware, "DRIVER_GPUS", tmp_path)
    assert gauges.has_gpu is False
    (tmp_path / "0000:01:00.0").mkdir()
    assert gauges.has_gpu is True
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gauges.has_gpu is False
