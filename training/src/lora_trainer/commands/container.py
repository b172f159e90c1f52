"""Check a container before anything else: mounts, config file, memory, GPU.

The entrypoint sets LORA_CONTAINER for the commands that train; the rest of its variables are
those of docker-compose.training.yml. Paths are the container's own here: what is printed names
them as the host does (`host.mounts`). Imports no torch.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import AccessError, ConfigError, StorageError, UnavailableError
from ..machine import is_hidden, read_machine
from ..model import stacks

CONTAINER = "LORA_CONTAINER"  # `train` or `preflight`
WORKSPACE = Path("/workspace")
WRITTEN = ("outputs", "models", "logs")
DEFAULT_CONFIG = Path("/opt/trainer/config.json")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
LEAST_SHARED_BYTES = 1 << 30
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
TOOLKIT = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"


def check_container(environ: Mapping[str, str]) -> list[str]:
    """Check the mounts and the GPU; return what is only worth a warning.

    Raises:
        AccessError: a mount cannot be written or read. StorageError: its disk is full.
        UnavailableError: there is no GPU where one is needed.
    """
    _check_mounts(environ, _workspace(environ))
    return [*_shared_memory_warnings(), *_gpu_warnings(environ)]


def find_config(environ: Mapping[str, str]) -> tuple[Path, str]:
    """Return the config file of a container, and where it comes from, "" where it is mounted.

    Raises:
        ConfigError: it is a folder, or not there. AccessError: it may not be read.
    """
    named = environ.get("LORA_TRAINER_CONFIG", "")
    path = Path(named) if named else _workspace(environ) / "config.json"
    if path.is_dir():
        raise ConfigError.of(
            "the config file is a folder",
            where=str(path),
            why="Docker creates a folder where the file to be mounted does not exist on the host",
            remedy=f"on the host: rmdir {path}, put a config file there, start again",
        )
    if path.exists():
        if os.access(path, os.R_OK):
            return path, ""
        stat = path.stat()
        raise AccessError.of(
            "the config file is not readable",
            where=str(path),
            why=f"its mode is {stat.st_mode & 0o777:o}, owner {stat.st_uid}, the container runs as "
            f"{_user()}",
            remedy=f"on the host: chmod a+r {path}",
        )
    if named:
        raise ConfigError.of(
            "the config file does not exist",
            where=f"LORA_TRAINER_CONFIG={named}",
            why="nothing is mounted there",
            remedy=f"mount it: -v $PWD/config.json:{named}:ro",
        )
    default = Path(environ.get("LORA_DEFAULT_CONFIG", DEFAULT_CONFIG))
    return _copied(default, path), f"no config file is mounted at {path}: the default job's"


def _workspace(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("LORA_WORKSPACE", WORKSPACE))


def _copied(default: Path, path: Path) -> Path:
    """Copy the default config to where its relative paths lead to the mounts."""
    try:
        shutil.copyfile(default, path)
    except OSError:  # the root is read-only
        path = Path(tempfile.gettempdir()) / "config.json"
        shutil.copyfile(default, path)
    return path


def _check_mounts(environ: Mapping[str, str], workspace: Path) -> None:
    refused = []
    for folder in (workspace / name for name in WRITTEN):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, prefix=".writable-"):
                pass
        except OSError as error:
            if error.errno == errno.EROFS:
                raise AccessError.of(
                    f"{folder} is not writable",
                    where=str(folder),
                    why="it is mounted read-only",
                    remedy="mount it without :ro",
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError.of(
                    f"{folder} is not writable",
                    where=str(folder),
                    why="the disk is full",
                    remedy="free disk space on the host: df -h",
                ) from error
            refused.append(folder)
    if refused:
        raise _not_ours(refused, environ)
    datasets = workspace / "datasets"
    if not os.access(datasets, os.R_OK | os.X_OK):
        raise AccessError.of(
            "the datasets are not readable",
            where=str(datasets),
            why=f"the folder belongs to {' '.join(_owners([datasets])) or 'nobody'}, the container "
            f"runs as {_user()}",
            remedy=f"on the host: chmod -R a+rX {datasets}",
        )


def _not_ours(folders: Sequence[Path], environ: Mapping[str, str]) -> Exception:
    """Return the error of folders of another user, with the command that makes them work.

    The container runs as their owner where they have one in common that is not root; else they
    are handed over, all at once.
    """
    owners = _owners(folders)
    names = " ".join(str(folder) for folder in folders)
    remedy = f"on the host: sudo chown -R {_user()} {names}"
    is_started_by_hand = environ.get("LORA_HOST_BY") != "run.sh"
    if len(owners) == 1 and not owners[0].startswith("0:") and is_started_by_hand:
        user, group = owners[0].split(":")
        remedy = f"train as their owner: docker run --user {owners[0]}"
        if environ.get("LORA_HOST_OUTPUTS"):
            command = compose_up(environ.get("LORA_STACK", ""))
            remedy = (
                f"train as their owner: LORA_UID={user} LORA_GID={group} {command}, or ./run.sh"
            )
    belongs = "it belongs" if len(folders) == 1 else "they belong"
    return AccessError.of(
        f"{folders[0]} is not writable",
        where=names,
        why=f"{belongs} to {' '.join(owners)}, the container runs as {_user()}",
        remedy=remedy,
    )


def compose_up(stack: str) -> str:
    """Return the command that starts the containers of a stack."""
    cpu = " -f docker-compose.cpu.yml" if stack == "cpu" else ""
    return f"docker compose -f docker-compose.training.yml{cpu} up"


def _owners(paths: Sequence[Path]) -> list[str]:
    owners = set()
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        owners.add(f"{stat.st_uid}:{stat.st_gid}")
    return sorted(owners)


def _user() -> str:
    return f"{os.getuid()}:{os.getgid()}"


def _shared_memory_warnings() -> Iterator[str]:
    try:
        total = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:
        return
    if total < LEAST_SHARED_BYTES:
        yield (
            f"{SHARED_MEMORY} has {total >> 20} MB; processes exchange data there: docker run "
            "--shm-size 8g"
        )


def _gpu_warnings(environ: Mapping[str, str]) -> Iterator[str]:
    """Look for a GPU where the stack has one; `check.preflight` judges those that are there."""
    stack = environ.get("LORA_STACK", "cpu")
    has_driver = shutil.which("nvidia-smi") is not None
    is_preflight = environ.get(CONTAINER) == "preflight"
    if is_preflight and environ.get("LORA_GPU_RESERVED") == "1" and not has_driver:
        yield from _host_gpu_notes(environ, stack)
        return
    if stack == "cpu" or is_hidden() or read_machine().has_gpu:
        return
    what, why, remedy = (
        ("no GPU answers", "NVML lists none", "nvidia-smi on the host; then docker run --gpus all")
        if has_driver
        else (
            "no GPU is visible",
            "the NVIDIA Container Toolkit has not mounted a driver into this container",
            f"docker run --gpus all; if that fails, set up the toolkit: {TOOLKIT}",
        )
    )
    if environ.get("LORA_REQUIRE_GPU") == "1":
        raise UnavailableError.of(what, where=f"the stack {stack}", why=why, remedy=remedy)
    yield f"{what}: {why}. Training runs on the CPU. Remedy: {remedy}"


def _host_gpu_notes(environ: Mapping[str, str], stack: str) -> Iterator[str]:
    """Check that the host has a GPU for the trainer: preflight's own container gets none.

    The driver of the host's kernel is seen all the same, but for Windows' Linux, which has it
    elsewhere.
    """
    path = Path(environ.get("LORA_NVIDIA_VERSION", NVIDIA_VERSION))
    try:
        text = path.read_text(errors="replace")
    except OSError:
        if "icrosoft" in platform.release():
            return
        raise UnavailableError.of(
            "this host has no NVIDIA GPU, or no driver for it",
            where=f"the stack {stack}",
            why=f"{path} does not exist, so Docker cannot give the trainer a GPU",
            remedy=f"without a GPU: {compose_up('cpu')}, or ./run.sh, which chooses "
            "automatically; with a GPU: install its driver and the NVIDIA Container Toolkit",
        ) from None
    version = re.search(r"\D(\d{3,}\.[\d.]+)", text)
    driver = version[1] if version else ""
    known = next((one for one in (stacks.CURRENT, stacks.CU121) if one.name == stack), None)
    if driver and known and int(driver.split(".")[0]) < known.driver:
        raise UnavailableError.of(
            f"the driver is too old for the stack {stack}",
            where=str(path),
            why=f"it is {driver}, and {known.driver} is required",
            remedy="update the driver, or train on the CPU: ./run.sh --cpu",
        )
    yield (
        f"the GPU's driver {driver} is loaded. If Docker cannot select the device driver "
        f'"nvidia", it lacks the toolkit: {TOOLKIT}'
    )
