"""Faults that a second try may avoid: whether a worker that ended for one is started again.

These restarts are no crashes: they do not count against `max_restarts`, and each kind has a
bound of its own. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import NotFiniteError
from ..run.events import Event, Failed, MemoryReduced, Warned
from ..run.folder import write_json
from ..run.memory_limits import MEMORY, BatchSizes, MemoryLimits, reduced, sizes_of
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


def reduction(sizes: BatchSizes, step: int, cause: str) -> list[Event]:
    """Return the events of sizes that became smaller after `step`."""
    return [
        MemoryReduced(
            step=step,
            micro_batch_examples=sizes.micro_batch_examples,
            eval_batch_examples=sizes.eval_batch_examples,
            gradient_checkpointing=sizes.gradient_checkpointing,
            cause=cause,
        ),
        Warned(
            message=f"memory ran out at step {step + 1}; from now on {sizes.text()}, evaluation "
            f"batches of {sizes.eval_batch_examples}: no figure changes by it ({cause})"
        ),
    ]


def read_limits(folder: Path) -> MemoryLimits:
    """Return what the folder's run was cut down to; a damaged file is as good as none."""
    try:
        raw = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
        counts = (raw["micro_batch_examples"], raw["eval_batch_examples"])
        if not all(type(count) is int and count >= 0 for count in counts):
            return MemoryLimits()
        return MemoryLimits(*counts, raw["gradient_checkpointing"] is True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return MemoryLimits()


def write_limits(folder: Path, limits: MemoryLimits) -> None:
    """Keep what the folder's run was cut down to, for every later start."""
    write_json(folder / MEMORY, asdict(limits))
