"""A folder that a command makes: whole or not at all, and never over something."""

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
            "the target lies below a file",
            where=str(target),
            why=f"{parents[0]} is not a folder",
            remedy="name another target",
        )
    is_empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise ConfigError.of(
            "the target is there already",
            where=str(target),
            why="it is a file" if target.is_file() else "it is a folder that is not empty",
            remedy=f"name another target, or move it aside: mv {target} {target}.old",
        )


def refuse_full_disk(target: Path, needed_bytes: int) -> None:
    """Refuse a disk without room for what will be written.

    Raises:
        StorageError: there is less.
    """
    free, needed = free_disk_bytes(target), needed_bytes + ASIDE_BYTES
    if free < needed:
        raise StorageError.of(
            "the disk has no room for the result",
            where=str(target),
            why=f"{size(needed)} are needed, {size(free)} are free",
            remedy=f"free some room (df -h {target.absolute().parent}), or name a target elsewhere",
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
