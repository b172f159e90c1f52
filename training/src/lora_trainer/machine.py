"""This machine's hardware: cores, memory (cgroup-aware), disk, GPUs. Imports no torch.

GPU facts come from NVML, so they are available before torch is imported. What cannot be read is
zero or empty, never guessed.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

Device = Literal["cpu", "cuda"]
CGROUP = Path("/sys/fs/cgroup")
# cgroup v1 says "no limit" with a number near 2**63, v2 with the word max.
UNLIMITED_BYTES = 1 << 60
OWN_CGROUPS = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU; memory in bytes, capability as (major, minor)."""

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware facts; memory is the host's or the tightest limit on it, in bytes."""

    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    driver: str = ""
    system: str = ""

    @property
    def has_gpu(self) -> bool:
        """Return whether a GPU can be used."""
        return bool(self.gpus)

    @property
    def device(self) -> Device:
        """Return the kind of device that trains: a GPU if there is one, else the CPU."""
        return "cuda" if self.has_gpu else "cpu"


def read_machine() -> Machine:
    """Read this machine's hardware, within the limits of this process."""
    gpus, driver = _read_gpus()
    return Machine(
        cores=_usable_cores(),
        memory_bytes=min(
            psutil.virtual_memory().total, cgroup_memory_limit_bytes(), address_space_bytes()
        ),
        gpus=gpus,
        driver=driver,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def address_space_bytes() -> int:
    """Return the limit set by `ulimit -v`; UNLIMITED_BYTES if there is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return UNLIMITED_BYTES if limit == resource.RLIM_INFINITY else min(limit, UNLIMITED_BYTES)


def cgroup_memory_limit_bytes(root: Path = CGROUP) -> int:
    """Return this process's memory limit from cgroup v2 or v1; UNLIMITED_BYTES if there is none."""
    limits = [
        min(int(text), UNLIMITED_BYTES)
        for folder, is_v2 in memory_cgroups(root)
        if (text := _read(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))).isdigit()
    ]
    return min(limits, default=UNLIMITED_BYTES)


def oom_kills(root: Path = CGROUP) -> int:
    """Return how many processes of this cgroup the kernel has killed for lack of memory.

    Without a memory cgroup, as on a bare machine, kills on the whole machine count.
    """
    counts = [
        _counted(_read(folder / ("memory.events" if is_v2 else "memory.oom_control")), "oom_kill")
        for folder, is_v2 in memory_cgroups(root)
    ]
    known = [count for count in counts if count is not None]
    if known:
        return max(known)
    return _counted(_read(VMSTAT), "oom_kill") or 0 if root == CGROUP else 0


def memory_cgroups(root: Path) -> list[tuple[Path, bool]]:
    """Return the folders of this process's memory cgroup, and whether each is of version 2.

    In a container its own cgroup is mounted as the root; elsewhere it is a subfolder.
    """
    folders = [(root, True), (root / "memory", False)]
    for line in _read(OWN_CGROUPS).splitlines() if root == CGROUP else ():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            folders.append((root / path.lstrip("/"), True))
        elif "memory" in controllers.split(","):
            folders.append((root / "memory" / path.lstrip("/"), False))
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _counted(text: str, name: str) -> int | None:
    """Return the number that follows a name in lines of name-value pairs; None if absent."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == [name] and len(words) > 1 and words[1].isdigit():
            return int(words[1])
    return None


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes on the disk where `path` is or would be created."""
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
    """Return the cores in the affinity mask, or fewer under a cgroup quota."""
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
    """Return whether CUDA_VISIBLE_DEVICES hides every GPU, or LORA_STACK is `cpu`."""
    if os.environ.get("LORA_STACK") == "cpu":
        return True
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def visible_devices(nvml: Any) -> list[tuple[int, Any]]:
    """Return the GPUs that this process may use, in CUDA's order: index by NVML, and handle.

    CUDA_VISIBLE_DEVICES names them by index, by UUID (a unique prefix is enough) or as a MIG slice.
    As in CUDA, the first name that matches nothing ends the list, and a GPU named twice leaves
    none. A handle is None if the GPU does not answer.

    Raises:
        NVMLError: the driver does not answer.
    Source: https://docs.nvidia.com/cuda/cuda-programming-guide, environment variables
    """
    handles = [_handle(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return list(enumerate(handles))
    devices: list[tuple[int, Any]] = []
    for name in (part.strip() for part in names.split(",")):
        if name.upper().startswith("MIG-"):
            # CUDA uses a single slice, whatever else is named.
            return devices or _mig_slice(nvml, name, handles)
        index = _index_of(nvml, name, handles)
        if index is None:
            break
        if any(index == other for other, _ in devices):
            return []
        devices.append((index, handles[index]))
    return devices


def _index_of(nvml: Any, name: str, handles: Sequence[Any]) -> int | None:
    """Return the index of a GPU named by index or UUID; None if there is no such GPU."""
    if name.isdigit():
        return int(name) if int(name) < len(handles) else None
    if not name.startswith("GPU-"):
        return None
    fitting = [i for i, one in enumerate(handles) if _uuid(nvml, one).startswith(name)]
    return fitting[0] if len(fitting) == 1 else None


def _mig_slice(nvml: Any, name: str, handles: Sequence[Any]) -> list[tuple[int, Any]]:
    """Return a MIG slice, with the index of the GPU that it is part of."""
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        parent = _uuid(nvml, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
    except nvml.NVMLError:
        return []
    return [(i, handle) for i, one in enumerate(handles) if _uuid(nvml, one) == parent]


def _handle(nvml: Any, index: int) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return None


def _uuid(nvml: Any, handle: Any) -> str:
    try:
        return _text(nvml.nvmlDeviceGetUUID(handle)) if handle is not None else ""
    except nvml.NVMLError:
        return ""


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_gpus() -> tuple[tuple[Gpu, ...], str]:
    if is_hidden():
        return (), ""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a driver that does not answer: no GPU to use
        return (), ""
    try:
        gpus = [_read_gpu(pynvml, index, handle) for index, handle in visible_devices(pynvml)]
        return tuple(gpus), _text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return (), ""
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    try:
        capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    except nvml.NVMLError:  # a MIG slice has the capability of its GPU
        parent = nvml.nvmlDeviceGetHandleByIndex(index)
        capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(parent))
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=capability,
    )
