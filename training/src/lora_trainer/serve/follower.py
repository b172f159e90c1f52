"""A run's recording, followed while another process writes it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ..run.lock import is_held
from ..run.recording import parse_lines, whole_lines
from ..run_folder import RunFolder
from .run_state import RunState

FOLLOW_SECONDS = 0.5


class EventFollower:
    """The events of a folder's run, taken up as they are written."""

    def __init__(self, folder: Path, live: RunState) -> None:
        self.folder = folder
        self.live = live
        self._redaction = live.redaction
        self._path = RunFolder(folder).events
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
                for event in parse_lines([line]):
                    self.live.add(self._redaction.event(event))


def stall_timeout_seconds(folder: Path) -> float:
    """Return the limit that the run was configured with, 0 where that cannot be read."""
    try:
        resolved = json.loads(RunFolder(folder).resolved.read_text())
        return float(resolved["monitoring"]["stall_timeout_seconds"]["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
