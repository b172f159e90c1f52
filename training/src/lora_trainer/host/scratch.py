"""Temporary folders: removed at the end, or after a kill by the next start.

Each contains a lock that its process holds and that the kernel releases however the process ends. A
folder whose lock is free is abandoned; process ids are not comparable between containers that share
a folder. Imports nothing from the package.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".in-use"
TEMPORARY = "lora-trainer-"  # how this program's folders in /tmp begin
# Versions before the lock made one at every start, and a kill left it there, empty.
UNLOCKED = re.compile(TEMPORARY + r"[a-z0-9_]{8}")
# A folder without a lock is about to get one, or is from a version without locks.
UNLOCKED_SECONDS = 3600.0


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str, own_pattern: str = "") -> Iterator[Path]:
    """Create a temporary folder, and remove those left by dead processes.

    In a folder that belongs to the program, `own_pattern` matches unfinished entries with or
    without a lock; elsewhere only entries with the prefix and a lock are removed. To keep the
    folder, call `release` and rename it.

    Raises:
        OSError: it cannot be created.
    """
    remove_abandoned(parent, own_pattern or f"{prefix}*", is_own=bool(own_pattern))
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        # The lock must not be visible before it is held.
        descriptor = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / f"{LOCK}.new").rename(folder / LOCK)
            yield folder
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def release(folder: Path) -> None:
    """Remove the lock file from a folder that is about to get its final name."""
    for name in (LOCK, f"{LOCK}.new"):
        (folder / name).unlink(missing_ok=True)


def remove_abandoned(parent: Path, pattern: str, *, is_own: bool) -> None:
    """Remove this user's files and folders matching a pattern whose process has died.

    Entries without a lock are removed only if the whole pattern belongs to the program.
    """
    for left in abandoned(parent, pattern, is_own=is_own):
        remove(left)


def remove_temporary() -> None:
    """Remove the temporary folders of this program's processes that died."""
    for left in abandoned_temporary():
        remove(left)


def abandoned_temporary() -> list[Path]:
    """Return the temporary folders of this program's processes that died."""
    parent = Path(tempfile.gettempdir())
    empty = [
        left
        for left in parent.glob(f"{TEMPORARY}*")
        if UNLOCKED.fullmatch(left.name) and _is_empty(left)
    ]
    return sorted(
        {
            *abandoned(parent, f"{TEMPORARY}*", is_own=False),
            *(left for one in empty for left in abandoned(parent, one.name, is_own=True)),
        }
    )


def abandoned(parent: Path, pattern: str, *, is_own: bool) -> list[Path]:
    """Return what `remove_abandoned` would remove."""
    leftovers = []
    for left in sorted(parent.glob(pattern)):
        with contextlib.suppress(OSError):
            status = left.lstat()
            if status.st_uid == os.getuid() and _is_abandoned(left, status.st_mtime, is_own):
                leftovers.append(left)
    return leftovers


def remove(left: Path) -> None:
    """Remove a file or folder, as far as that is permitted."""
    with contextlib.suppress(OSError):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def _is_abandoned(left: Path, changed: float, is_own: bool) -> bool:
    try:
        descriptor = os.open(left / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return is_own and time.time() - changed > UNLOCKED_SECONDS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
