"""Metrics missing from `events.jsonl`: checkpoints carry them, and a resumed run repeats them.

The worker never waits for the supervisor, which writes the recording. Events in flight when both
are killed are lost, although a checkpoint may already count those steps as done. So a checkpoint
carries the metrics that the recording does not have yet. Imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Generated,
    Resumed,
    RunStarted,
    StepDone,
)
from .recording import parse_lines, read_events

Figure = StepDone | Evaluated | Generated | CheckpointSaved
FIGURES = (StepDone, Evaluated, Generated, CheckpointSaved)
Key = tuple[str, int, str]
# The order in which a step's figures come about.
ORDER = {StepDone.kind: 0, Evaluated.kind: 1, Generated.kind: 2, CheckpointSaved.kind: 3}


class Unrecorded:
    """The figures of this process that the recording does not have yet."""

    def __init__(self, recording: Path) -> None:
        self._recording = recording
        self._pending: dict[Key, Figure] = {}
        self._lock = threading.Lock()
        self._offset = _size(recording)

    def add(self, event: Event) -> None:
        """Take up an event that is on its way to the recording."""
        if isinstance(event, FIGURES):
            with self._lock:
                self._pending[_key(event)] = event

    def beside(self, emit: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return `emit`, whose events are taken up here before they go on their way."""

        def both(event: Event) -> None:
            self.add(event)
            emit(event)

        return both

    def up_to_now(self) -> Callable[[], list[str]]:
        """Return a function that gives the figures taken up so far, as lines of a recording.

        It leaves out those that the disk has when it is called, which waits for the disk and
        may happen in another thread.
        """
        with self._lock:
            taken = list(self._pending)

        def lines() -> list[str]:
            recorded = list(parse_lines(self._new_lines()))
            with self._lock:
                for event in recorded:
                    if isinstance(event, FIGURES):
                        self._pending.pop(_key(event), None)
                return [self._pending[key].to_line() for key in taken if key in self._pending]

        return lines

    def _new_lines(self) -> list[bytes]:
        """Return the whole lines that were recorded since the last time, once the disk has them."""
        with contextlib.suppress(OSError), self._recording.open("rb") as file:
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_size < self._offset:  # somebody has emptied it
                self._offset = 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            return whole.split(b"\n")
        return []


def recall(recording: Path, carried: Sequence[str], step: int) -> tuple[list[Figure], list[Figure]]:
    """Return the figures of the way to a checkpoint, and those to repeat for the recording.

    `carried` are the lines that the checkpoint carries. A repeated step makes readers of the
    recording forget what they have of later ones, so that these are repeated with it.
    """
    recorded = _standing(recording)
    events = parse_lines(line.encode() for line in carried)
    figures = dict(recorded)
    for event in events:
        if isinstance(event, FIGURES):
            figures.setdefault(_key(event), event)
    ordered = sorted(
        (figure for figure in figures.values() if figure.step <= step),
        key=lambda figure: (figure.step, ORDER[figure.kind]),
    )
    missing = [figure for figure in ordered if _key(figure) not in recorded]
    first = min((one.step for one in missing if isinstance(one, StepDone)), default=math.inf)
    return ordered, [one for one in ordered if one.step >= first or one in missing]


def _standing(recording: Path) -> dict[Key, Figure]:
    """Return the figures that readers of the recording have in the end; the way of `History`."""
    standing: dict[Key, Figure] = {}
    last, digest = 0, ""
    for event in read_events(recording):
        if isinstance(event, RunStarted):
            if digest not in ("", event.config_digest):  # another run in the same folder
                standing, last = {}, 0
            digest = event.config_digest
        elif isinstance(event, Resumed):
            standing, last = _until(standing, event.step), event.step
        elif isinstance(event, FIGURES):
            if isinstance(event, StepDone):
                standing = _until(standing, event.step - 1) if event.step <= last else standing
                last = event.step
            standing[_key(event)] = event
    return standing


def _until(figures: dict[Key, Figure], step: int) -> dict[Key, Figure]:
    return {key: figure for key, figure in figures.items() if figure.step <= step}


def _key(figure: Figure) -> Key:
    return figure.kind, figure.step, figure.when if isinstance(figure, Generated) else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
