"""Readings of this machine's memory, disk and GPUs every few seconds.

GPU values come from NVML, so they are available before torch is imported; memory is relative to the
cgroup's limit, if there is one. What cannot be read is None, never guessed.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..machine import (
    CGROUP,
    UNLIMITED_BYTES,
    cgroup_memory_limit_bytes,
    is_hidden,
    memory_cgroups,
    visible_devices,
)

SECONDS = 2.0
KEPT_READINGS = 900
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - read, never written
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU is doing."""

    index: int
    name: str
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    utilization_percent: int | None
    temperature_celsius: int | None
    power_watts: float | None


@dataclass(frozen=True, slots=True)
class HostReading:
    """What the host is doing; memory against the smaller of the machine's and the cgroup's."""

    memory_used_bytes: int
    memory_limit_bytes: int
    disk_free_bytes: int | None
    disk_total_bytes: int | None
    shm_free_bytes: int | None
    shm_total_bytes: int | None
    cpu_percent: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Host and GPUs at a time (seconds since the epoch)."""

    time: float
    host: HostReading
    gpus: tuple[GpuReading, ...]


class Gauges:
    """Reads the machine in a thread of its own; NVML may take seconds to answer."""

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self.folder = folder
        self.latest: Reading | None = None
        self._seconds = seconds
        self._kept: list[Reading] = []
        self._stride = 1
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; a driver that does not answer is not waited for."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def readings(self) -> list[Reading]:
        """Return the kept readings, oldest first; the longer the run, the farther apart."""
        return list(self._kept)

    @property
    def free_disk_bytes(self) -> int | None:
        """Return the free bytes where the outputs go."""
        return self.latest.host.disk_free_bytes if self.latest else None

    @property
    def has_gpu(self) -> bool:
        """Return whether there is a GPU; before NVML has answered, by the driver's own files."""
        if self.latest is not None:
            return bool(self.latest.gpus)
        try:
            return not is_hidden() and any(DRIVER_GPUS.iterdir())
        except OSError:
            return False

    def keep(self, reading: Reading) -> None:
        """Take up a reading; when there are many, every second one goes."""
        self.latest = reading
        if self._count % self._stride == 0:
            self._kept.append(reading)
        self._count += 1
        if len(self._kept) > KEPT_READINGS:
            self._kept = self._kept[::2]
            self._stride *= 2

    def _run(self) -> None:
        nvml = open_nvml()
        try:
            while not self._stop.is_set():
                self.keep(Reading(time.time(), read_host(self.folder), read_gpus(nvml)))
                self._stop.wait(self._seconds)
        finally:
            if nvml is not None:
                nvml.nvmlShutdown()


def open_nvml() -> Any:
    """Return NVML, initialised; None where there is no GPU to read."""
    if is_hidden():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not answer
        return None
    return pynvml


def read_gpus(nvml: Any) -> tuple[GpuReading, ...]:
    """Read every visible GPU; one that has fallen off the bus keeps its place, empty."""
    if nvml is None:
        return ()
    try:
        devices = visible_devices(nvml)
    except nvml.NVMLError:
        return ()
    return tuple(_read_gpu(nvml, index, handle) for index, handle in devices)


def _read_gpu(nvml: Any, index: int, handle: Any) -> GpuReading:
    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError:  # not every GPU tells everything
            return None

    if handle is None:
        return GpuReading(index, "", None, None, None, None, None)
    name = ask(lambda: nvml.nvmlDeviceGetName(handle)) or ""
    memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    milliwatts = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return GpuReading(
        index=index,
        name=name.decode() if isinstance(name, bytes) else str(name),
        memory_used_bytes=int(memory.used) if memory else None,
        memory_total_bytes=int(memory.total) if memory else None,
        utilization_percent=int(rates.gpu) if rates else None,
        temperature_celsius=ask(
            lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        ),
        power_watts=None if milliwatts is None else milliwatts / 1000,
    )


def read_host(folder: Path) -> HostReading:
    """Read memory, disk and processors."""
    used, limit = memory_bytes()
    disk_free, disk_total = _room(folder)
    shm_free, shm_total = _room(SHARED_MEMORY)
    return HostReading(
        used, limit, disk_free, disk_total, shm_free, shm_total, psutil.cpu_percent(interval=None)
    )


def memory_bytes(root: Path = CGROUP) -> tuple[int, int]:
    """Return the memory in use and the most that may be, of the cgroup if it has a limit.

    The page cache that the kernel may drop at any time counts as free, as `docker stats`
    has it.
    """
    machine = psutil.virtual_memory()
    limit = cgroup_memory_limit_bytes(root)
    if limit >= min(machine.total, UNLIMITED_BYTES):
        return machine.total - machine.available, machine.total
    for folder, is_v2 in reversed(memory_cgroups(root)):  # the process's own comes last
        current = "memory.current" if is_v2 else "memory.usage_in_bytes"
        droppable = "inactive_file" if is_v2 else "total_inactive_file"
        try:
            used = int((folder / current).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        table = dict(line.split(maxsplit=1) for line in lines if " " in line)
        return max(0, used - int(table.get(droppable, 0))), limit
    return machine.total - machine.available, limit


def _room(path: Path) -> tuple[int | None, int | None]:
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if path == SHARED_MEMORY and existing != path:
        return None, None
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return None, None
    return usage.free, usage.total
