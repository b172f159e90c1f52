"""Folders for work in progress: removed at the end, and after a kill by the next start.

Each holds a lock while its process lives, which the kernel frees whatever ends that process.
So a folder whose lock is free is abandoned; a process id would not tell in containers that
share a folder. Imports nothing of the package.
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
# A folder without a lock is about to get one, or was made by a version without locks.
UNLOCKED_SECONDS = 3600.0


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str, own_pattern: str = "") -> Iterator[Path]:
    """Make a folder that does not outlive its use, and remove those of processes that died.

    In a folder of the program's own, `own_pattern` names what is unfinished there, whether it
    has a lock or not; elsewhere only what begins with the prefix and has a lock is removed. A
    folder that is to stay is renamed, after `release`.

    Raises:
        OSError: it cannot be made.
    """
    remove_abandoned(parent, own_pattern or f"{prefix}*", is_own=bool(own_pattern))
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        # Nobody may see the lock before it is held.
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
    """Take the lock's file out of a folder that is about to get its final name."""
    for name in (LOCK, f"{LOCK}.new"):
        (folder / name).unlink(missing_ok=True)


def remove_abandoned(parent: Path, pattern: str, *, is_own: bool) -> None:
    """Remove this user's files and folders of a pattern whose process is no more.

    What has no lock is removed only where all of that pattern is the program's own.
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
