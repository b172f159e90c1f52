"""`events.jsonl`, the recording of a run: its writer and its reader.

Lines truncated by a kill and events unknown to this version are skipped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from .events import Event, parse_line


def read_events(path: Path) -> Iterator[Event]:
    """Return the events of a recording; none where there is no file that can be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        yield from parse_lines(file)


def parse_lines(lines: Iterable[bytes]) -> Iterator[Event]:
    """Return the events among lines."""
    for line in lines:
        event = parse_line(line.decode("utf-8", "replace"))
        if event is not None:
            yield event


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Return lines up to one that is still being written."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield line


class EventFile:
    """Appends events to a file; a full disk loses some of them and never the run."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+", buffering=0)
        self._is_torn = False
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            # A killed run may have left half a line: what follows must not join it.
            self._is_torn = self._file.read(1) != b"\n"

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError), self._file:
            os.fsync(self._file)

    def append(self, event: Event) -> None:
        """Write one event as a line of its own, if the disk takes it."""
        line = b"\n" * self._is_torn + event.to_line().encode()
        try:
            self._is_torn = self._file.write(line) != len(line)
        except OSError:
            return
