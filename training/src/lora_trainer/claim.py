"""A run's hold on its output folder: the lock, and the room that an earlier run leaves it.

The kernel frees the lock of processes that died, so a stale one is taken over at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from .checkpoint_folder import has_any
from .errors import BusyError, ConfigError
from .output import (
    DONE,
    LOCK,
    RESOLVED,
    archive,
    changes,
    finish_archiving,
    open_lock,
    read_digest,
)
from .sources import Settings

# How long a start waits for the worker of a supervisor that was killed alone.
ORPHAN_SECONDS = 120.0


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[IO[str]]:
    """Hold the output folder alone; give the lock's file, which a worker inherits.

    An archiving that a kill interrupted is completed first, so that nobody meets half a run.

    Raises:
        BusyError: another run holds it; its process and host are named.
    """
    with open_lock(folder / LOCK) as file:
        until = time.monotonic() + ORPHAN_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
            # A dead supervisor's worker is about to save and end.
            if is_alive(holder) or time.monotonic() > until:
                raise BusyError.of(
                    "another run holds this output folder",
                    where=str(folder),
                    why=f"its lock is held by {holder}",
                    remedy="wait for it, stop it, or give another --run_name",
                )
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        finish_archiving(folder)
        yield file


def is_alive(holder: str) -> bool:
    """Tell whether the process that a lock names may be running; one elsewhere may."""
    words = holder.split()
    if len(words) != 4 or not words[1].isdigit() or words[3] != socket.gethostname():
        return True
    try:
        return psutil.Process(int(words[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_left_alone(folder: Path, settings: Settings) -> bool:
    """Tell whether the folder's run is finished and shall stay as it is."""
    return (folder / DONE).exists() and settings.config.output.on_finished == "stop"


def make_room(folder: Path, settings: Settings) -> Path | None:
    """Clear the way for a run; return where the one that was there is now, if it was moved.

    Raises:
        ConfigError: an unfinished run with another configuration is there.
    """
    before = read_digest(folder)
    if (folder / DONE).exists() or (
        before is not None and settings.config.output.resume == "never"
    ):
        return archive(folder)
    if before is None or before == settings.config.digest():
        return None
    if not has_any(folder / "checkpoints"):
        return archive(folder)
    changed = changes(folder / RESOLVED, settings.redacted())
    raise ConfigError.of(
        "the output folder holds an unfinished run with another configuration",
        where=str(folder),
        why=f"changed since: {', '.join(changed) or 'a default'}",
        remedy="undo the change to resume, give another --run_name, or start anew with "
        "--resume never (the old run is moved aside, not removed)",
    )
