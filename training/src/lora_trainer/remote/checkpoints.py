"""Checkpoints in a remote folder: a reader sees each whole or not at all.

A checkpoint exists if its manifest does: that is written last and removed first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint_folder import (
    FILES,
    MANIFEST,
    CorruptCheckpointError,
    make_temporary,
    name_of,
    remove,
    step_of,
    verify,
)
from ..run_folder import RunFolder
from .folder import RemoteFolder


def remote_name(step: int, file: str = "") -> str:
    """Return the name of a checkpoint, or of one of its files, in a run's remote folder."""
    return "/".join(filter(None, (RunFolder.checkpoints, name_of(step), file)))


def steps_listed(folder: RemoteFolder) -> list[int]:
    """Return the steps whose manifest is listed, in order."""
    paths = [name.split("/") for name in folder.listed(RunFolder.checkpoints)]
    steps = (step_of(names[1]) for names in paths if len(names) == 3 and names[2] == MANIFEST)
    return sorted(step for step in steps if step is not None)


def upload(
    folder: RemoteFolder,
    path: Path,
    before_manifest: Callable[[], None],
    read_back: set[tuple[str, str]],
) -> None:
    """Upload a checkpoint: its files, each read back and compared by hash, then its manifest.

    `before_manifest` uploads what must be there once the checkpoint exists. `read_back` holds the
    names and hashes of files that an earlier attempt has verified.

    Raises:
        CorruptCheckpointError: a file there has different content. OSError and others: the store's.
    """
    step = step_of(path.name)
    assert step is not None
    text = (path / MANIFEST).read_bytes()
    there = folder.read(remote_name(step, MANIFEST))
    if there == text:  # an earlier process wrote it, after it had read the files back
        return
    if there is not None:
        # A run that repeats a step saves it with other times: the remote one is as good, and to
        # replace it would leave none for a moment.
        if _is_sound(folder, step, there):
            return
        folder.remove(remote_name(step, MANIFEST))
    manifest = json.loads(text)
    for name in FILES:
        target, digest = remote_name(step, name), str(manifest[name]["sha256"])
        if (target, digest) in read_back:
            continue
        folder.upload(path / name, target)
        if folder.sha256(target) != digest:
            raise CorruptCheckpointError(f"{path.name}/{name} has other content in the store")
        read_back.add((target, digest))
    before_manifest()
    folder.write(remote_name(step, MANIFEST), text)
    if folder.read(remote_name(step, MANIFEST)) != text:
        raise CorruptCheckpointError(f"{path.name}/{MANIFEST} has other content in the store")


def _is_sound(folder: RemoteFolder, step: int, manifest: bytes) -> bool:
    try:
        entries = json.loads(manifest)
        return set(entries) == set(FILES) and all(
            folder.sha256(remote_name(step, name)) == entry["sha256"]
            for name, entry in entries.items()
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return False


def download(folder: RemoteFolder, step: int, checkpoints: Path) -> None:
    """Download a checkpoint to the local disk and verify it.

    Raises:
        CorruptCheckpointError: it is not there, or does not verify. OSError and others: the
        store's, or the disk's.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary(checkpoints, name_of(step))
    try:
        for name in (MANIFEST, *FILES):
            try:
                folder.download(remote_name(step, name), temporary / name)
            except FileNotFoundError as error:
                raise CorruptCheckpointError(f"{name} is missing") from error
        verify(temporary)
        temporary.replace(checkpoints / name_of(step))
    except BaseException:
        remove(temporary)
        raise


def discard(folder: RemoteFolder, steps: Iterable[int]) -> None:
    """Remove checkpoints from the remote folder, each manifest first."""
    for step in steps:
        for name in (MANIFEST, *FILES):
            folder.remove(remote_name(step, name))
