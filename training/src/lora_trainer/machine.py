"""What this machine has: cores, memory (cgroup-aware), disk, GPUs. Imports no torch.

GPU facts come from NVML, so they are there before torch is. What cannot be read is
zero or empty, never guessed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
# cgroup v1 says "no limit" with a number near 2**63, v2 with the word max.
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU; memory in bytes, capability as (major, minor)."""

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware facts; memory is the smaller of the host's and the cgroup's limit, in bytes."""

    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    driver: str = ""
    system: str = ""

    @property
    def has_gpu(self) -> bool:
        """Tell whether a GPU may be used."""
        return bool(self.gpus)


def read_machine() -> Machine:
    """Read this machine's facts, within what the process may use of it."""
    gpus, driver = _read_gpus()
    return Machine(
        cores=_usable_cores(),
        memory_bytes=min(psutil.virtual_memory().total, cgroup_memory_limit_bytes()),
        gpus=gpus,
        driver=driver,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def cgroup_memory_limit_bytes(root: Path = CGROUP) -> int:
    """Return this process's memory limit from cgroup v2 or v1; UNLIMITED_BYTES where none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(int(text), UNLIMITED_BYTES)
    return UNLIMITED_BYTES


def oom_kills(root: Path = CGROUP) -> int:
    """Return how often the kernel has killed a process of this cgroup for memory."""
    counts = (
        _counted(root / name, "oom_kill") for name in ("memory.events", "memory/memory.oom_control")
    )
    return max(counts)


def _counted(path: Path, name: str) -> int:
    """Return the number behind a name in a file of such lines; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.split()[:1] == [name]:
                return int(line.split()[1])
    return 0


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes where `path` is or would be made."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def peak_memory_bytes() -> int:
    """Return this process's largest resident size so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return psutil.Process().memory_info().rss


def _usable_cores(root: Path = CGROUP) -> int:
    """Return the cores of the affinity mask, or fewer where a cgroup quota says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cores
    if quota in ("max", "-1"):
        return cores
    return max(1, min(cores, int(quota) // int(period)))


def is_hidden() -> bool:
    """Tell whether CUDA_VISIBLE_DEVICES hides every GPU, or the stack `cpu` is asked for."""
    if os.environ.get("LORA_STACK") == "cpu":
        return True
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def _read_gpus() -> tuple[tuple[Gpu, ...], str]:
    if is_hidden():
        return (), ""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not answer: no GPU to use
        return (), ""
    try:
        found = [_read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        return _visible(found), str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return (), ""
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: object, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    return Gpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),  # type: ignore[attr-defined]
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),  # type: ignore[attr-defined]
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),  # type: ignore[attr-defined]
    )


def _visible(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Keep the GPUs that CUDA_VISIBLE_DEVICES names by index, in its order."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None or not all(part.strip().isdigit() for part in names.split(",")):
        return tuple(gpus)
    by_index = {gpu.index: gpu for gpu in gpus}
    wanted = [int(part) for part in names.split(",")]
    return tuple(by_index[index] for index in wanted if index in by_index)
