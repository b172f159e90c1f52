"""Local copies of datasets and runs on an object store, for the commands that read them."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from ..checkpoint_folder import CorruptCheckpointError, name_of, step_of
from ..errors import UnavailableError
from ..host.addresses import default_cache, is_address, local_name, unfolded
from ..host.disk import CHECKSUMS
from ..run_folder import RunFolder
from . import checkpoints, restore
from .folder import RemoteFolder, answered

DOWNLOAD_SECONDS = 24 * 3600.0


def downloads() -> Path:
    """Return the folder of the copies; `lora-trainer clean` empties it."""
    return default_cache() / "downloads"


def copy_of_data(address: str, is_wanted: Callable[[str], bool]) -> Path:
    """Return an up-to-date local copy of a file, or of the requested files of a folder.

    Raises:
        UnavailableError: nothing is there, or the store cannot be reached. AccessError,
        StorageError, ConfigError: as for every address.
    """
    folder = RemoteFolder(address)
    is_file = answered(folder, folder.is_file)
    if is_file:
        version, names = answered(folder, lambda: folder.version("")), [""]
    else:
        listed = answered(folder, folder.listed)
        names = sorted(name for name in listed if ".." not in name.split("/") and is_wanted(name))
        version = str([(name, sorted(map(str, listed[name].items()))) for name in names])
    if not names:
        raise UnavailableError.of(
            "the dataset does not exist, or has no data files",
            where=address,
            remedy="correct the address; a folder's address names what its files begin with",
        )
    digest = hashlib.sha256(version.encode()).hexdigest()[:16]
    copy = downloads() / local_name(address) / digest
    if not copy.is_dir():
        answered(folder, lambda: _download(folder, names, copy), DOWNLOAD_SECONDS)
    return copy / address.rstrip("/").rpartition("/")[2] if is_file else copy


def _download(folder: RemoteFolder, names: list[str], copy: Path) -> None:
    beside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.writing")
    try:
        for name in names:
            local = name or folder.address.rpartition("/")[2]
            folder.download(name, beside / local)
        try:
            beside.rename(copy)
        except OSError:  # another process was faster
            if not copy.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def copy_of_run(named: str) -> str:
    """Return a verified local copy of the run, `final_model` or checkpoint at an address.

    Any other name is returned unchanged.

    Raises:
        UnavailableError: there is no run, or the store cannot be reached.
    """
    address = unfolded(named).rstrip("/")
    if not is_address(address):
        return named
    root, inner = _split(address)
    copy = downloads() / local_name(root)
    fetch(root, copy, inner)
    return str(copy / inner)


def fetch(address: str, target: Path, inner: str = "") -> None:
    """Copy a run to a local folder: its records, and its adapter or its newest checkpoint.

    Raises:
        UnavailableError: there is no run there, it does not verify, or the store does not answer.
    """
    folder = RemoteFolder(address)
    if not answered(folder, lambda: restore.has_run(folder)):
        raise UnavailableError.of(
            "there is no run at this address",
            where=address,
            why=f"neither {RunFolder.digest} nor {RunFolder.resolved} is there",
            remedy="correct the address: the one that output_dir and run_name gave",
        )
    target.mkdir(parents=True, exist_ok=True)
    restore.clear(target)

    def bring() -> None:
        step = step_of(inner.rpartition("/")[2])
        has_model = folder.read(f"{RunFolder.final_model}/{CHECKSUMS}") is not None
        if step is not None:
            restore.bring_records(folder, target)
            checkpoints.download(folder, step, RunFolder(target).checkpoints)
        elif has_model:
            restore.bring_records(folder, target)
            restore.bring_folder(folder, target, RunFolder.final_model)
        else:
            restore.bring(folder, target)

    try:
        answered(folder, bring, DOWNLOAD_SECONDS)
    except UnavailableError as error:
        cause = error.__cause__
        if not isinstance(cause, CorruptCheckpointError):
            raise
        raise UnavailableError.of(
            "what is in the object store does not verify",
            where=address,
            why=str(cause),
            remedy="if the run is going on, try again; else use another checkpoint",
        ) from error


def _split(address: str) -> tuple[str, str]:
    """Return a run's address and what is named within it."""
    head, _, last = address.rpartition("/")
    if last == RunFolder.final_model:
        return head, last
    step = step_of(last)
    if step is not None and head.endswith(f"/{RunFolder.checkpoints}"):
        return head.rpartition("/")[0], f"{RunFolder.checkpoints}/{name_of(step)}"
    return address, ""
