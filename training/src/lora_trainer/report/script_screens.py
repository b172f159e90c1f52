"""What a run prints for scripts: only warnings (`quiet`), or events as JSON (`log_format`)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..run import events
from ..run.events import Event
from ..run.status import RunStatus
from .terminal import Sink

PROGRESS_SECONDS = 10.0  # between two events of the progress within a phase
TROUBLE = (events.Warned, events.MemoryReduced, events.Restarted, events.Failed)


class QuietScreen:
    """Prints warnings and restarts; errors are the command's last block."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def line(self, text: str, style: str) -> None:
        """Print a line that warns."""
        if style == "yellow":
            self._sink.write(text.rstrip() + "\n")

    def print_line(self, text: str, status: RunStatus) -> None:
        """Print nothing."""

    def update(self, event: Event, status: RunStatus) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Leave the stream as it is."""


class JsonScreen:
    """Prints each event as `events.jsonl` has it, steps by `logging_steps`; notes too."""

    def __init__(self, sink: Sink, logging_steps: int, *, is_quiet: bool) -> None:
        self._sink = sink
        self._logging_steps = max(1, logging_steps)
        self._is_quiet = is_quiet
        self._progress_at = float("-inf")

    def line(self, text: str, style: str) -> None:
        """Print nothing: the event says the same."""

    def print_line(self, text: str, status: RunStatus) -> None:  # noqa: ARG002 - a note has no status
        """Print text that is no event."""
        if not self._is_quiet:
            self._write({"event": "note", "time": time.time(), "text": text})

    def update(self, event: Event, status: RunStatus) -> None:
        """Print an event, unless it is one of many alike."""
        if type(event) is Event or (self._is_quiet and not isinstance(event, TROUBLE)):
            return
        if isinstance(event, events.StepDone):
            is_end = event.step in (1, status.total_steps)
            if event.step % self._logging_steps and not is_end:
                return
        if isinstance(event, events.Progress):
            if 0 <= event.time - self._progress_at < PROGRESS_SECONDS:
                return
            self._progress_at = event.time
        self._write({"event": event.kind, **asdict(event)})

    def close(self) -> None:
        """Leave the stream as it is."""

    def _write(self, content: Mapping[str, Any]) -> None:
        """Write JSON that every parser takes: a loss that is NaN or infinite is null."""
        strict = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in content.items()
        }
        self._sink.write(json.dumps(strict) + "\n")
