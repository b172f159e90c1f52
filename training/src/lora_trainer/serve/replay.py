"""Serves a recorded run, finished or still going on, from its output folder alone.

Reads `events.jsonl`, follows it while another process writes it, and answers under the
same addresses as that process would. Writes nothing into the folder and takes no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import ConfigError, UnavailableError
from ..redaction import Redaction
from ..run.events import parse_line
from ..run.folder import EVENTS, LOG, RESOLVED
from ..run.lock import is_held, own_address
from ..run.recording import whole_lines
from .run_state import RunState
from .server import LogFollower, StatusServer, read_token

FOLLOW_SECONDS = 0.5
USUAL_PORT = 8080


class EventFollower:
    """The events of a folder's run, taken up as they are written."""

    def __init__(self, folder: Path, live: RunState) -> None:
        self.folder = folder
        self.live = live
        self._redaction = live.redaction
        self._path = folder / EVENTS
        self._at = 0
        self._file_number = -1

    def read(self) -> None:
        """Read what is new; start over when another run has taken the folder."""
        self.live.silence.look()
        try:
            info = self._path.stat()
        except OSError:
            return
        if info.st_ino != self._file_number or info.st_size < self._at:
            self._file_number = info.st_ino
            self._at = self.live.replay(self._path)
        elif info.st_size > self._at:
            self._follow()
        self.live.is_abandoned = not self.live.status.is_over and not is_held(self.folder)

    def _follow(self) -> None:
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._at)
            for line in whole_lines(file):
                self._at += len(line)
                event = parse_line(line.decode("utf-8", "replace"))
                if event is not None:
                    self.live.add(self._redaction.event(event))


def view(
    folder: Path,
    *,
    host: str,
    port: int | None,
    token_file: str | None,
    allowed_hosts: Iterable[str],
    say: Callable[[str], None],
) -> None:
    """Serve the folder's run until a signal comes; port None: the usual one, or a free one.

    Raises:
        ConfigError: there is no run. UnavailableError: the port is taken.
    """
    if not (folder / EVENTS).is_file():
        raise _no_run(folder)
    token = read_token(token_file)
    live = RunState(Redaction.of(os.environ, token), stall_timeout_seconds(folder))
    server = StatusServer(
        live,
        host=host,
        port=USUAL_PORT if port is None else port,
        token=token,
        allowed_hosts=allowed_hosts,
        folder=folder,
        log=LogFollower(live, folder / LOG),
    )
    try:
        server.start()
    except UnavailableError:
        if port is not None:
            raise
        server.port = 0
        server.start()
    recording = EventFollower(folder, live)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        recording.read()
        if (own := own_address(folder)) and not live.is_abandoned:
            say(f"the run serves itself at {own}")
        say(f"dashboard: {server.url}  (Ctrl-C ends it)")
        while not ended.wait(FOLLOW_SECONDS):
            recording.read()
    finally:
        server.stop()


def stall_timeout_seconds(folder: Path) -> float:
    """Return the limit that the run was configured with, 0 where that cannot be read."""
    try:
        resolved = json.loads((folder / RESOLVED).read_text())
        return float(resolved["monitoring"]["stall_timeout_seconds"]["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _no_run(folder: Path) -> Exception:
    others = sorted(path.parent.name for path in folder.glob(f"*/{EVENTS}"))
    remedy = (
        f"lora-trainer dashboard {folder / others[0]}"
        if others
        else "name the folder that holds a run's events.jsonl"
    )
    return ConfigError.of(
        "there is no run to show",
        where=str(folder),
        why=f"it has no {EVENTS}" + (f"; runs in it: {', '.join(others[:10])}" if others else ""),
        remedy=remedy,
    )
