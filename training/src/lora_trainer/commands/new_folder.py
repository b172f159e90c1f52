"""Create a target folder atomically, and never overwrite anything."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, StorageError
from ..host.disk import follow_umask, sync
from ..machine import free_disk_bytes
from ..units import size

# Tokenizer, card and what the file system itself takes.
ASIDE_BYTES = 20_000_000


def refuse_existing(target: Path) -> None:
    """Refuse a target that is there already.

    Raises:
        ConfigError: it is, and is no empty folder; or it lies below a file.
    """
    parents = [one for one in target.absolute().parents if one.exists()]
    if parents and not parents[0].is_dir():
        raise ConfigError.of(
            "a parent of the target is a file",
            where=str(target),
            why=f"{parents[0]} is not a folder",
            remedy="use another target",
        )
    is_empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise ConfigError.of(
            "the target already exists",
            where=str(target),
            why="it is a file" if target.is_file() else "it is a folder that is not empty",
            remedy=f"use another target, or move it away: mv {target} {target}.old",
        )


def refuse_full_disk(target: Path, needed_bytes: int) -> None:
    """Refuse a disk without room for what will be written.

    Raises:
        StorageError: there is less.
    """
    free, needed = free_disk_bytes(target), needed_bytes + ASIDE_BYTES
    if free < needed:
        raise StorageError.of(
            "not enough disk space for the result",
            where=str(target),
            why=f"{size(needed)} are required, {size(free)} are free",
            remedy=f"free disk space (df -h {target.absolute().parent}), or use a target on "
            "another disk",
        )


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write in; it becomes `target` when all went well.

    Raises:
        ConfigError: as `refuse_existing`.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.absolute().with_name(f".{target.name}.{os.getpid()}.writing")
    beside.mkdir()
    try:
        yield beside
        follow_umask(beside)
        for path in (*(one for one in beside.rglob("*") if one.is_file()), beside):
            sync(path)
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync(target.absolute().parent)
