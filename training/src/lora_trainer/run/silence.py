"""Measure how long a run has made no progress, excluding suspended time.

`health.stall_timeout` is the limit; the supervisor's watchdog ends a worker that exceeds it.

It uses the monotonic clock, because the wall clock may be changed. Gaps between two checks do not
count: the machine was suspended, or this process was stopped, probably with the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Checks come about once a second, later on a busy machine.
LONGEST_GAP_SECONDS = 3.0


class Silence:
    """Seconds without progress while being checked; readable from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._looked = clock()

    def begin(self, seconds: float = 0.0) -> None:
        """Start counting, from the given number of seconds."""
        self._seconds, self._looked = seconds, self._clock()

    def look(self) -> float:
        """Add the time since the last check; return the seconds counted so far."""
        now = self._clock()
        self._seconds, self._looked = self._seconds + self._since(now), now
        return self._seconds

    @property
    def seconds(self) -> float:
        """Return the seconds counted so far."""
        return self._seconds + self._since(self._clock())

    def _since(self, now: float) -> float:
        passed = now - self._looked
        return passed if passed <= LONGEST_GAP_SECONDS else 0.0
