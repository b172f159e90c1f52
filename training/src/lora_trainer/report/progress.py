"""Progress and time left of a long command, on standard error.

On a terminal one line is rewritten; elsewhere, as in a log, there is a line every ten seconds.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ..units import duration, percent

LINE_SECONDS = 10.0
REFRESH_SECONDS = 0.25
LEAST_FRACTION = 0.01  # what is done before less of the work says nothing about the time left
CLEAR_LINE = "\r\x1b[K"


class Meter:
    """Shows a piece of work, `with Meter("answering", 64, "prompts") as meter`."""

    def __init__(self, doing: str, total: int, unit: str, stream: TextIO | None = None) -> None:
        self._doing = doing
        self._total = total
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._every_seconds = REFRESH_SECONDS if self._is_terminal else LINE_SECONDS
        self._start = self._shown = time.monotonic()
        self._done, self._fraction = 0, 0.0

    def __enter__(self) -> Meter:
        self._write(f"{self._doing}: {self._total:,} {self._unit} ...", is_lasting=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._write("", is_lasting=False)

    def update(self, done: int) -> None:
        """Take up how many units are done."""
        self._done = max(self._done, done)
        self.advance(self._done / max(1, self._total))

    def advance(self, fraction: float) -> None:
        """Take up the share of the work that is done, where that is known in between units."""
        self._fraction = fraction = max(fraction, self._fraction)
        now = time.monotonic()
        if now - self._shown < self._every_seconds:
            return
        self._shown = now
        text = f"{self._doing}: {self._done:,} of {self._total:,} {self._unit}"
        if LEAST_FRACTION <= fraction < 1:
            left = (now - self._start) * (1 - fraction) / fraction
            text += f", {percent(fraction)}, {duration(left)} left"
        self._write(text, is_lasting=not self._is_terminal)

    def _write(self, text: str, *, is_lasting: bool) -> None:
        begin = CLEAR_LINE if self._is_terminal else ""
        self._stream.write(begin + text + ("\n" if is_lasting else ""))
        self._stream.flush()
