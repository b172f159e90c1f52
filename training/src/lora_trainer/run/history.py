"""The history of a run: the series behind its charts, and its timeline.

`History` takes up one event after the other. Work that was lost to a kill and redone
counts once; the timeline keeps all of it. What is known at the end is in `status`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from ..errors import MEANINGS
from . import events

KEPT_POINTS = 8192
KEPT_MOMENTS = 200
WHOLE = sys.maxsize  # as many as there are

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of one step, or the means of several that end with `step`."""

    step: int
    first_step: int
    epoch: float
    loss: float
    loss_min: float
    loss_max: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    memory_bytes: int
    gpu_memory_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed over these steps."""
        return self.tokens / self.seconds if self.seconds > 0 else None


class Moment(NamedTuple):
    """An entry of the timeline; its kind says how it is shown."""

    time: float
    kind: str
    text: str


class History:
    """The series of a run, in bounded memory: old points are merged when there are many.

    With a capacity of `WHOLE`, every step stays a point of its own.
    """

    def __init__(self, capacity: int = KEPT_POINTS) -> None:
        assert capacity >= 2
        self.samples: dict[tuple[int, str], events.Sample] = {}  # by index and "before" or "after"
        self.resumes: list[int] = []  # the steps from which the run went on
        self.timeline: list[Moment] = []
        self.moments_left_out = 0  # in the middle of the timeline
        self._capacity = capacity
        self._points: list[Point] = []
        self._pending: list[Point] = []  # the steps of the next, not yet full, point
        self._stride = 1  # steps in a point
        self._step = 0
        self._evals: dict[int, events.Evaluated] = {}
        self._checkpoints: dict[int, events.CheckpointSaved] = {}
        self._phases: set[str] = set()  # those of this attempt that the timeline has

    def add(self, event: events.Event) -> None:
        """Add an event."""
        match event:
            case events.StepDone(step=step):
                if step <= self._step:  # a new start from the base model says no `resumed`
                    self._rewind(step - 1)
                self._step = step
                self._append(_point(event))
            case events.Evaluated(step=step):
                self._keep(self._evals, step, event)
            case events.CheckpointSaved(step=step):
                self._keep(self._checkpoints, step, event)
            case events.Sample(index=index, when=when):
                self._keep(self.samples, (index, when), event)
            case events.Resumed(step=step):
                self._rewind(step)
                self.resumes.append(step)
        self._remember(event)

    def points(self, max_points: int) -> list[Point]:
        """Return at most so many points, oldest first; the last one ends with the last step."""
        return _merged([*self._points, *self._pending], max_points)

    def evals(self) -> list[events.Evaluated]:
        """Return the evaluations, oldest first."""
        return [self._evals[step] for step in sorted(self._evals)]

    def checkpoints(self) -> list[events.CheckpointSaved]:
        """Return the checkpoints that were saved, oldest first, removed ones too."""
        return [self._checkpoints[step] for step in sorted(self._checkpoints)]

    def _append(self, point: Point) -> None:
        self._pending.append(point)
        if len(self._pending) < self._stride:
            return
        self._points.append(_mean(self._pending))
        self._pending = []
        if len(self._points) >= self._capacity:
            self._points = _merged(self._points, self._capacity // 2)
            self._stride *= 2

    def _keep(self, table: dict[Any, Any], key: object, event: events.Event) -> None:
        table[key] = event
        if len(table) > self._capacity:
            del table[next(iter(table))]

    def _rewind(self, step: int) -> None:
        # A point that reaches beyond the step goes as a whole: no figure of a step that
        # will be done again stays behind.
        for series in (self._pending, self._points):
            while series and series[-1].step > step:
                series.pop()
        tables: tuple[dict[Any, Any], ...] = (self._evals, self._checkpoints, self.samples)
        for table in tables:
            for late in [key for key, event in table.items() if event.step > step]:
                del table[late]
        self._step = step

    def _remember(self, event: events.Event) -> None:
        """Put the event into the timeline; of phases that alternate, the first of an attempt."""
        entry = _timeline_entry(event)
        if entry is None or entry[1] in self._phases:
            return
        if isinstance(event, events.RunStarted | events.Restarted | events.Resumed):
            self._phases.clear()
        if isinstance(event, events.PhaseChanged):
            self._phases.add(entry[1])
        self.timeline.append(Moment(event.time, *entry))
        if len(self.timeline) > KEPT_MOMENTS:
            del self.timeline[KEPT_MOMENTS // 2]
            self.moments_left_out += 1


def stretches(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Cut into so many stretches of about the same length; there are as many items at least."""
    edges = [number * len(items) // count for number in range(count + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def _merged(points: list[Point], max_points: int) -> list[Point]:
    """Return at most so many points, neighbours merged."""
    count = max(1, max_points)
    if len(points) <= count:
        return list(points)
    return [_mean(stretch) for stretch in stretches(points, count)]


def _point(step: events.StepDone) -> Point:
    return Point(
        step=step.step,
        first_step=step.step,
        epoch=step.epoch,
        loss=step.loss,
        loss_min=step.loss,
        loss_max=step.loss,
        learning_rate=step.learning_rate,
        grad_norm=step.grad_norm,
        tokens=step.tokens,
        seconds=step.step_seconds,
        memory_bytes=step.memory_bytes,
        gpu_memory_bytes=step.gpu_memory_bytes,
    )


def _mean(points: Sequence[Point]) -> Point:
    """Merge neighbours: means weighted by steps; a NaN among them stays visible."""
    if len(points) == 1:
        return points[0]
    weights = [point.step - point.first_step + 1 for point in points]

    def mean(values: Iterable[float]) -> float:
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    return Point(
        step=points[-1].step,
        first_step=points[0].first_step,
        epoch=points[-1].epoch,
        loss=mean(p.loss for p in points),
        loss_min=min(p.loss_min for p in points),
        loss_max=max(p.loss_max for p in points),
        learning_rate=mean(p.learning_rate for p in points),
        grad_norm=mean(p.grad_norm for p in points),
        tokens=sum(p.tokens for p in points),
        seconds=sum(p.seconds for p in points),
        memory_bytes=max(p.memory_bytes for p in points),
        gpu_memory_bytes=max(p.gpu_memory_bytes for p in points),
    )


def _timeline_entry(event: events.Event) -> tuple[str, str] | None:
    """Return the kind and the text of an event that belongs into the timeline."""
    match event:
        case events.RunStarted(attempt=attempt):
            return "start", f"Run started, attempt {attempt + 1}" if attempt else "Run started"
        case events.PhaseChanged(phase=phase, detail=detail):
            return "phase", phase.capitalize() + (f": {detail}" if detail else "")
        case events.Resumed(step=step, skipped=skipped):
            ending = f"; {len(skipped)} newer checkpoints failed verification" if skipped else ""
            return "resume", f"Resumed from the checkpoint of step {step}{ending}"
        case events.Restarted(attempt=attempt, cause=cause, exit_code=code):
            return "bad", f"Worker ended with exit code {code} ({cause}); restart {attempt}"
        case events.Warned(message=message):
            return "warning", message
        case events.Failed(exit_code=code):
            return "bad", f"Failed with exit code {code} ({MEANINGS.get(code, 'unknown')})"
        case events.Stopped(step=step, signal=signal):
            return (
                "bad",
                f"Stopped by {signal}, saved at step {step}" if step else f"Stopped by {signal}",
            )
        case events.Finished(step=step):
            return "good", f"Finished at step {step}"
    return None
