"""Faults that a second try may avoid: whether a worker that ended for one is started again.

These restarts are no crashes: they do not count against `max_restarts`, and each kind has a
bound of its own. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotFiniteError
from ..run.events import Event, Failed
from ..run.memory_limits import reduced, reduction, sizes_of, write_limits
from ..run.status import RunStatus
from .endings import WorkerEnd

# In which a smaller batch needs less memory.
BATCHED_PHASES = ("training", "saving", "evaluating")


@dataclass(frozen=True, slots=True)
class Retry:
    """Why a worker is started again, and what is to be known of it first."""

    cause: str
    events: Sequence[Event] = ()


class Recovery:
    """What was tried so far in this run; asked each time that a worker ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._not_finite_step = -1

    def after(self, end: WorkerEnd, status: RunStatus) -> Retry | None:
        """Return how the worker is started again; None where the usual rules decide."""
        if end.is_out_of_memory:
            return self._after_memory(end, status)
        if end.failure is not None and end.failure.retry == NotFiniteError.KIND:
            return self._after_not_finite(end.failure)
        return None

    def _after_not_finite(self, failure: Failed) -> Retry | None:
        """Try each step once more; one that fails again, or an earlier one, is final."""
        if failure.step <= self._not_finite_step:
            return None
        self._not_finite_step = failure.step
        return Retry(f"{failure.problems[0]['what']}; tried once more from the last checkpoint")

    def _after_memory(self, end: WorkerEnd, status: RunStatus) -> Retry | None:
        """Go on with smaller batches as long as there are any; that bounds the tries."""
        sizes = sizes_of(status.plan)
        if sizes is None or status.phase not in BATCHED_PHASES:
            return None
        smaller = reduced(sizes, is_evaluation=status.phase == "evaluating")
        if smaller is None:
            return None
        write_limits(self.folder, smaller.limits)
        return Retry(
            f"{end.cause}; goes on with {smaller.text()}",
            reduction(smaller, status.step, end.cause),
        )
