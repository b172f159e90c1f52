"""The run lock of a remote folder: a file that its holder renews.

An object store has no lock that is released when its process dies. The holder rewrites the file
every few seconds; another run watches it, and takes it over if it does not change for
`STALE_SECONDS`, or says that the run has ended. Clocks are never compared. docs/storage.md lists
what this does and does not guarantee.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BusyError, TrainerError
from ..run_folder import RunFolder
from .folder import RemoteFolder, answered

BEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # two that took it over at once: the one written last has it
IDENTITY = ".mirror.json"  # in the local folder: it was the last to write the remote one


class Lease:
    """The lock of one remote folder, held for one local folder."""

    def __init__(self, folder: RemoteFolder, local: Path) -> None:
        self._folder, self._local = folder, local
        self.identity = _identity_of(local)
        self._beat = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.holder = ""  # who took the lock from us
        self.was_ours = False  # this local folder was the last to write

    @property
    def is_lost(self) -> bool:
        """Return whether another run has taken the remote folder over."""
        return bool(self.holder)

    def take(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock, waiting for a dead holder's to become stale.

        Raises:
            BusyError: another run holds it. AccessError, StorageError, UnavailableError: the
            store's.
        """
        if answered(self._folder, lambda: self._folder.create(RunFolder.lock, self._content())):
            self._begin()
            return
        seen = self._read()
        self.was_ours = seen.get("identity") == self.identity
        if seen and not self.was_ours and not seen.get("is_released"):
            say(f"waiting up to {STALE_SECONDS:.0f} s: {_named(seen)} may still be writing there")
            until = time.monotonic() + STALE_SECONDS
            while time.monotonic() < until:
                self._ended.wait(min(1.0, STALE_SECONDS))
                now = self._read()
                if now != seen and not now.get("is_released"):
                    raise self._busy(now)
                if now.get("is_released"):
                    break
        answered(self._folder, self._write)
        if not self.was_ours:
            self._ended.wait(SETTLE_SECONDS)
            if (now := self._read()).get("identity") != self.identity:
                raise self._busy(now)
        self._begin()

    def remember(self) -> None:
        """Record in the local folder that it was the last to write to the remote one."""
        text = json.dumps({"identity": self.identity, "address": self._folder.address})
        (self._local / IDENTITY).write_text(text, encoding="utf-8")

    def release(self) -> None:
        """Write that the run has ended; if the store rejects that, the lock becomes stale."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)
        if not self.is_lost:
            with contextlib.suppress(TrainerError):
                answered(self._folder, lambda: self._write(is_released=True), BEAT_SECONDS)

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._keep, name="remote lock", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the mirror reports what the store refuses
                now = self._parsed(self._folder.read(RunFolder.lock))
                if now and now.get("identity") != self.identity:
                    self.holder = _named(now)
                    return
                self._write()

    def _write(self, *, is_released: bool = False) -> None:
        self._folder.write(RunFolder.lock, self._content(is_released=is_released))

    def _content(self, *, is_released: bool = False) -> bytes:
        self._beat += 1
        content = {
            "identity": self.identity,
            "holder": f"pid {os.getpid()} on {socket.gethostname()}",
            "beat": self._beat,
            "is_released": is_released,
        }
        return json.dumps(content).encode()

    def _read(self) -> dict[str, Any]:
        return answered(self._folder, lambda: self._parsed(self._folder.read(RunFolder.lock)))

    @staticmethod
    def _parsed(content: bytes | None) -> dict[str, Any]:
        try:
            parsed = json.loads(content or b"{}")
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}

    def _busy(self, seen: dict[str, Any]) -> TrainerError:
        return BusyError.of(
            "another run is using this output folder",
            where=self._folder.address,
            why=f"{_named(seen)} renews the lock there",
            remedy="wait for it, stop it, or use another --run_name",
        )


def _named(seen: dict[str, Any]) -> str:
    return str(seen.get("holder") or "an unknown process")


def _identity_of(local: Path) -> str:
    """Return the identity of a local folder; a new one if it has none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((local / IDENTITY).read_text(encoding="utf-8"))["identity"])
    return uuid.uuid4().hex
