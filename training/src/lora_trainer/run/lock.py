"""The lock of an output folder.

The kernel releases the lock of dead processes, so there are no stale locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from ..errors import BusyError, Problem
from ..run_folder import RunFolder
from .folder import finish_archiving, open_lock

# How long a start waits for the worker of a supervisor that was killed alone.
ORPHAN_SECONDS = 120.0


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[IO[str]]:
    """Lock the output folder; yield the lock file, which workers inherit.

    An interrupted archiving is completed first, so that nobody sees half a run.

    Raises:
        BusyError: another run holds it; its process and host are named.
    """
    with open_lock(RunFolder(folder).lock) as file:
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
                raise _busy(folder, holder)
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        finish_archiving(folder)
        yield file


def check_free(folder: Path) -> None:
    """Check whether a run holds the folder, without changing it.

    Raises:
        BusyError: one does.
    """
    if not RunFolder(folder).lock.is_file():
        return
    with open_lock(RunFolder(folder).lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder, file.read().strip() or "unknown") from None


def _busy(folder: Path, holder: str) -> BusyError:
    return BusyError(
        Problem(
            "another run is using this output folder",
            where=str(folder),
            why=f"its lock is held by {holder}",
            remedy="wait for it, stop it, or use another --run_name",
        )
    )


def is_alive(holder: str) -> bool:
    """Return whether the process that a lock names may be running; one elsewhere may."""
    words = holder.split()
    if len(words) != 4 or not words[1].isdigit() or words[3] != socket.gethostname():
        return True
    try:
        return psutil.Process(int(words[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_held(folder: Path) -> bool:
    """Return whether a process, as far as can be seen from here, is running the folder's run.

    The lock itself is not tried: for that moment a run could not begin.
    """
    try:
        holder = RunFolder(folder).lock.read_text().strip()
        number = RunFolder(folder).lock.stat().st_ino
        if holder.split()[-1:] != [socket.gethostname()]:
            return True
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    if not is_alive(holder):  # but its worker, which has inherited the lock, may be saving
        return any(line.split()[-3].endswith(f":{number}") for line in locks.splitlines())
    return True


def own_address(folder: Path) -> str:
    """Return where the run's own process answers; "" if it is gone, or its id another's."""
    try:
        server = json.loads(RunFolder(folder).server.read_text())
        command = psutil.Process(int(server["pid"])).cmdline()
        is_trainer = any("lora_trainer" in word or "train_lora" in word for word in command)
        return str(server["url"]) if is_trainer else ""
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return ""
