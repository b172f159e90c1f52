"""The state of one live run, shared between threads: status, history, newest events.

The supervisor adds events in its thread; the server's thread reads. Adding never waits for a
reader: an event is folded, encoded once, and put into a bounded ring buffer, from which each stream
reads what it has not sent yet. A client too slow for the buffer receives `reset`.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..redaction import Redaction
from ..run.events import Event, Sample, is_foreign, parse_line
from ..run.health import AGAIN, Health, health
from ..run.history import History
from ..run.recording import whole_lines
from ..run.silence import Silence
from ..run.status import RunStatus, fold

KEPT_FRAMES = 4096
LOG_LINES = 2000


class Frame(NamedTuple):
    """An event as it is streamed, with its sequence number."""

    sequence: int
    data: bytes


class RunState:
    """What is known of a run; safe to read from any thread while another one adds.

    A run that is not over and has no process is abandoned: `dashboard` sees it by the lock.
    """

    def __init__(
        self,
        redaction: Redaction,
        stall_timeout_seconds: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.status = RunStatus()
        self.history = History()
        self.detail = ""  # what happens before the run is known
        self.is_abandoned = False
        self.free_disk_bytes: Callable[[], int | None] = lambda: None
        self.boot = f"{int(clock() * 1000):x}"  # tells this server's sequence from another's
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.log_lines_seen = 0
        self.silence = Silence()
        self.lines_skipped = 0  # of the recording: JSON that is no event of ours
        self._stall_timeout_seconds = stall_timeout_seconds
        self._clock = clock
        self.redaction = redaction
        self._frames: deque[Frame] = deque(maxlen=KEPT_FRAMES)
        self._lock = threading.Lock()
        self._sequence = 0

    @property
    def sequence(self) -> int:
        """Return the number of the newest event."""
        return self._sequence

    def add(self, event: Event) -> RunStatus:
        """Take up an event; return the status after it."""
        status = fold(self.status, event)
        if status.progress_time != self.status.progress_time:
            self.silence.begin()
        data = frame(event.kind, asdict(event), f"{self.boot}.{self._sequence + 1}")
        with self._lock:
            self.history.add(event)
            self.status = status
            self._sequence += 1
            self._frames.append(Frame(self._sequence, data))
        return status

    def replay(self, path: Path) -> int:
        """Take up what was recorded before, if anything was, without streaming it.

        Returns the bytes that were read; half a line at the end is not.
        """
        status, history, read_bytes = RunStatus(), History(), 0
        self.lines_skipped = 0
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            for line in whole_lines(file):
                read_bytes += len(line)
                text = line.decode("utf-8", "replace")
                event = parse_line(text)
                if event is None:
                    self.lines_skipped += is_foreign(text)
                else:
                    event = self.redaction.event(event)
                    status = fold(status, event)
                    history.add(event)
        now = self._clock()
        self.silence.begin(max(0.0, now - (status.progress_time or now)))
        with self._lock:
            self.status, self.history = status, history
            self._frames.clear()
            self._sequence += 1  # whoever streams has missed something
        return read_bytes

    def add_log(self, text: str) -> None:
        """Take up lines of the log."""
        lines = self.redaction.text(text).splitlines()
        with self._lock:
            self.log.extend(lines)
            self.log_lines_seen += len(lines)

    def frames_after(self, sequence: int) -> tuple[list[Frame], bool]:
        """Return the frames after a number, and whether none of those was lost."""
        with self._lock:
            if sequence == self._sequence:
                return [], True
            oldest = self._frames[0].sequence if self._frames else self._sequence + 1
            if sequence > self._sequence or sequence + 1 < oldest:
                return [], False
            start = sequence + 1 - oldest
            return [self._frames[i] for i in range(start, len(self._frames))], True

    def log_after(self, count: int) -> tuple[list[str], int]:
        """Return the log's lines after the first `count`, as far as kept, and their new count."""
        with self._lock:
            new = min(self.log_lines_seen - count, len(self.log))
            return (list(self.log)[-new:] if new > 0 else []), self.log_lines_seen

    def series(self, max_points: int) -> dict[str, Any]:
        """Return copies of the history's series, taken at one moment."""
        with self._lock:
            history = self.history
            evals, resumes = history.evals(), list(history.resumes)
        return {"points": history.points(max_points), "evals": evals, "resumes": resumes}

    def timeline(self) -> list[Any]:
        """Return the moments of the run, oldest first."""
        with self._lock:
            return list(self.history.timeline)

    def samples(self) -> list[Sample]:
        """Return the answers to the evaluation prompts, in the order of their rows."""
        with self._lock:
            kept = dict(self.history.samples)
        return [kept[key] for key in sorted(kept)]

    def health(self) -> Health:
        """Judge the run now."""
        # By the time of its events: of the clock here, only the seconds that pass count.
        now = (self.status.progress_time or 0.0) + self.silence.seconds
        judged = health(self.status, now, self._stall_timeout_seconds, self.free_disk_bytes())
        if self.is_abandoned and not self.status.is_over:
            reason = "the run's process died without recording an end"
            return Health("unhealthy", reason, judged.seconds_since_progress, False, AGAIN)
        return judged


def frame(kind: str, content: object, identity: str = "") -> bytes:
    """Return a server-sent event."""
    head = f"id: {identity}\n" if identity else ""
    return f"event: {kind}\n{head}data: {to_json(content)}\n\n".encode()


def to_json(content: object) -> str:
    """Return strict JSON: NaN and infinities are null."""
    try:
        return json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, separators=(",", ":"))


def _finite(value: object) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
