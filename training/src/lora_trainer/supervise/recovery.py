"""Decide whether to restart a worker after an error that a retry may avoid.

These restarts do not count against `max_restarts`; each kind has its own limit. Imports no torch.
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
    """Why a worker is restarted, and the events to record before."""

    cause: str
    events: Sequence[Event] = ()


class Recovery:
    """The retries so far in this run; consulted whenever a worker ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._not_finite_step = -1

    def after(self, end: WorkerEnd, status: RunStatus) -> Retry | None:
        """Return how to restart the worker; None if the usual limits decide."""
        if end.is_out_of_memory:
            return self._after_memory(end, status)
        if end.failure is not None and end.failure.retry == NotFiniteError.KIND:
            return self._after_not_finite(end.failure)
        return None

    def _after_not_finite(self, failure: Failed) -> Retry | None:
        """Retry each step once; a failure at the same or an earlier step is final."""
        if failure.step <= self._not_finite_step:
            return None
        self._not_finite_step = failure.step
        return Retry(f"{failure.problems[0]['what']}; retrying once from the last checkpoint")

    def _after_memory(self, end: WorkerEnd, status: RunStatus) -> Retry | None:
        """Continue with smaller batches while there are any, which limits the retries."""
        sizes = sizes_of(status.plan)
        if sizes is None or status.phase not in BATCHED_PHASES:
            return None
        smaller = reduced(sizes, is_evaluation=status.phase == "evaluating")
        if smaller is None:
            return None
        write_limits(self.folder, smaller.limits)
        return Retry(
            f"{end.cause}; continuing with {smaller.text()}",
            reduction(smaller, status.step, end.cause),
        )
