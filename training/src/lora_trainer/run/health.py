"""Judge from status and clock whether a run is healthy, and if not, why and what to do.

`stall_timeout` is the limit without progress, which `silence.py` measures. For /health it makes the
run unhealthy; the supervisor's watchdog (`supervise/watchdog.py`) ends the worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import MEANINGS
from .status import RunStatus

QUIET_SECONDS = 1800.0  # limit for phases other than training, such as a model download
# A margin for short steps: a busy machine, pages read from disk.
LEAST_STALL_SECONDS = 60.0
AGAIN = "run the same command again to resume from the last checkpoint"
STALL_STEPS = 20  # the stall limit, in steps as slow as the slowest recent one


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the run is healthy, and if not, why and what to do."""

    status: Literal["healthy", "unhealthy"]
    reason: str
    seconds_since_progress: float
    is_training: bool
    remedy: str = ""


def health(
    status: RunStatus,
    now: float,
    stall_timeout_seconds: float,
    free_disk_bytes: int | None = None,
) -> Health:
    """Judge the run at the wall-clock time `now`.

    A run that finished or was stopped is healthy. `stall_timeout_seconds` 0 means
    `stall_timeout`'s own; without `free_disk_bytes` the disk is not judged.
    """
    since = 0.0 if status.progress_time is None else max(0.0, now - status.progress_time)
    reason, remedy = _fault(status, free_disk_bytes)
    limit = stall_timeout(status, stall_timeout_seconds)
    if not reason and not status.is_over and since > limit:
        reason = f"no progress for {since:.0f} s in phase {status.phase} (limit {limit:.0f} s)"
        remedy = f"see train.log; stop the run, then {AGAIN}"
    state: Literal["healthy", "unhealthy"] = "unhealthy" if reason else "healthy"
    return Health(state, reason, since, status.is_training, remedy)


def stall_timeout(status: RunStatus, configured_seconds: float) -> float:
    """Return how long the run may now make no progress; 0 configured: from step times.

    The supervisor's watchdog and /health both use it. A configured limit applies after the first
    step, since loading a large model may take longer. In training the limit is derived from the
    step time; steps that are not logged also report progress (`loop.BEAT_SECONDS`). Other phases
    have QUIET_SECONDS.
    """
    is_under_way = status.steps_in_attempt > 0
    if configured_seconds > 0:
        return configured_seconds if is_under_way else max(configured_seconds, QUIET_SECONDS)
    slowest = max((step.step_seconds for step in status.recent), default=0.0)
    measured = max(STALL_STEPS * slowest, LEAST_STALL_SECONDS)
    if status.phase == "training" and status.steps_in_attempt > 1:
        return measured
    evaluation = status.last_eval.eval_seconds if status.last_eval else 0.0
    return max(measured, 3 * evaluation, QUIET_SECONDS)


def bytes_of_next_checkpoint(status: RunStatus) -> int:
    """Return what the next checkpoint takes on disk, 0 before the plan is known."""
    # Before the first one: the adapter and Adam's two moments in float32.
    expected = 3 * 4 * status.planned("trainable_parameters")
    return max((saved.bytes for saved in status.checkpoints), default=expected)


def _fault(status: RunStatus, free_disk_bytes: int | None) -> tuple[str, str]:
    """Return what is wrong and what helps, both empty if nothing is."""
    if status.exit_code not in (None, 0, 143):
        reason = f"the run ended with exit code {status.exit_code}: {_cause(status)}"
        return reason, _remedy(status)
    if status.phase == "failed":
        return f"the run failed: {_cause(status)}", _remedy(status)
    if status.is_over:
        return "", ""
    if status.is_worker_down:
        reason = f"the worker ended ({_cause(status)}) and is being restarted"
        return reason, "nothing to do: it resumes from the last checkpoint"
    if not status.is_loss_finite:
        reason = f"the loss is not finite at step {status.step}"
        return reason, "start over (--resume never) with a lower --learning_rate or --max_grad_norm"
    needed = bytes_of_next_checkpoint(status)
    if free_disk_bytes is not None and free_disk_bytes < needed:
        reason = (
            f"the disk has {free_disk_bytes:,} free bytes, the next checkpoint needs {needed:,}"
        )
        return reason, f"free disk space in {status.output_dir}"
    return "", ""


def _remedy(status: RunStatus) -> str:
    problems = status.failure.problems if status.failure else []
    return (problems[0].get("remedy") if problems else "") or f"see train.log; {AGAIN}"


def _cause(status: RunStatus) -> str:
    if status.failure is not None and status.failure.problems:
        return status.failure.problems[0].get("what", "")
    if status.is_worker_down and status.restarts:
        return status.restarts[-1].cause
    return MEANINGS.get(status.exit_code or 0, "cause unknown") if status.exit_code else "unknown"
