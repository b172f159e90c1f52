"""How long a run has made no progress, counted so that only the run can be to blame.

The monotonic clock, since the wall clock is set forward and back. A gap between two looks
does not count either: the machine was suspended, or this process was stopped, and with it,
most likely, the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Looks come about once a second; a busy machine delays them a little.
LONGEST_GAP_SECONDS = 3.0


class Silence:
    """Seconds without progress while somebody looked; read from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._looked = clock()

    def begin(self, seconds: float = 0.0) -> None:
        """Count from now on; so many seconds have passed already."""
        self._seconds, self._looked = seconds, self._clock()

    def look(self) -> float:
        """Add the time since the last look; return the seconds counted so far."""
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
