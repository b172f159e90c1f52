"""The status of a run: a pure fold over its events.

`fold` makes the next `RunStatus` from the last one and an event; `replay` does so for
the lines of an `events.jsonl`, with the same result at any time. A status stays small
however long the run is; the series behind the charts are in `history`, the judgement of
its health in `health`. A run that resumes at step k repeats the steps after k, so
whatever was known of those is forgotten then. Nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import events
from .events import Event, Phase, parse_line
from .smaller_sizes import with_sizes

RECENT_STEPS = 20  # steps behind the speed and the time left
KEPT_EVENTS = 100  # evaluations, checkpoints, restarts, samples and warnings kept, of each
KEPT_CHARACTERS = 2000  # of one sample text or warning

ENDINGS: frozenset[Phase] = frozenset({"finished", "failed", "stopped"})
INTERLUDES: frozenset[Phase] = frozenset({"evaluating", "saving"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved checkpoint, with the step it followed, so that a resume can go back to it."""

    step: int
    path: str
    bytes: int
    seconds: float
    is_best: bool
    after: events.StepDone | None
    saved_time: float = 0.0
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunWarning:
    """One warning and how often it was given."""

    message: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class RunStatus:
    """All that is known of a run after an event.

    Units: seconds, bytes, wall-clock times since the epoch; `exact_match` and
    accuracies are shares of one.
    """

    run_name: str = ""
    config_digest: str = ""
    output_dir: str = ""
    attempt: int = 0
    pid: int = 0
    phase: Phase = "starting"
    detail: str = ""
    progress: events.Progress | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    first_loss: float | None = None
    latest: events.StepDone | None = None
    recent: tuple[events.StepDone, ...] = ()
    ranks: tuple[Mapping[str, float], ...] = ()  # of several processes, what each last did
    slowest_rank: int | None = None
    steps_in_attempt: int = 0
    stepped_seconds: float = 0.0  # of all steps done, repeated ones too
    stepped_tokens: int = 0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0
    eval_before: events.Evaluated | None = None  # the one at step 0
    evals: tuple[events.Evaluated, ...] = ()  # the newest
    bests: tuple[events.Evaluated, ...] = ()  # each lower than the one before
    generated_before: events.Generated | None = None
    generated_after: events.Generated | None = None
    samples: tuple[events.Sample, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    saving: tuple[events.StepDone, ...] = ()  # steps whose checkpoints may still be written
    resumed: events.Resumed | None = None
    restarts: tuple[events.Restarted, ...] = ()
    warnings: tuple[RunWarning, ...] = ()
    warnings_left_out: int = 0
    failure: events.Failed | None = None
    finished: events.Finished | None = None
    stopped: events.Stopped | None = None
    exit_code: int | None = None
    is_worker_down: bool = False
    started_time: float | None = None
    last_time: float | None = None
    progress_time: float | None = None
    elapsed_seconds: float = 0.0  # between events; the time between two runs does not count

    @property
    def total_steps(self) -> int:
        """Return the planned optimizer steps, 0 before the plan is known."""
        return self.planned("total_steps")

    @property
    def last_loss(self) -> float | None:
        """Return the loss of the last step, which may be NaN or infinite."""
        return self.latest.loss if self.latest else None

    @property
    def paused_seconds(self) -> float:
        """Return the time between a stop and the next start, which is not in `elapsed_seconds`."""
        passed = (self.last_time or 0.0) - (self.started_time or 0.0)
        return max(0.0, passed - self.elapsed_seconds)

    @property
    def is_loss_finite(self) -> bool:
        """Return False when the last step's loss is NaN or infinite."""
        return self.latest is None or math.isfinite(self.latest.loss)

    @property
    def tokens_per_second(self) -> float | None:
        """Return the recent speed in tokens of any kind, trained or not."""
        return _rate(sum(s.tokens for s in self.recent), sum(s.step_seconds for s in self.recent))

    @property
    def mean_tokens_per_second(self) -> float | None:
        """Return the speed over all steps done."""
        return _rate(self.stepped_tokens, self.stepped_seconds)

    @property
    def eta_seconds(self) -> float | None:
        """Return the time left after the last step, evaluations and checkpoints included."""
        if self.is_over or not self.recent or not self.total_steps:
            return None
        step_seconds = sum(step.step_seconds for step in self.recent) / len(self.recent)
        seconds = step_seconds * max(0, self.total_steps - self.step)
        if self.evals:
            seconds += self.evals[-1].eval_seconds * self._times_left("eval_every_steps")
        if self.checkpoints:
            seconds += self.checkpoints[-1].wait_seconds * self._times_left("save_every_steps")
        return seconds

    @property
    def last_eval(self) -> events.Evaluated | None:
        """Return the newest evaluation."""
        return self.evals[-1] if self.evals else None

    @property
    def best_eval(self) -> events.Evaluated | None:
        """Return the evaluation with the lowest loss."""
        return self.bests[-1] if self.bests else None

    @property
    def is_over(self) -> bool:
        """Return whether the run finished, failed or was stopped."""
        return self.phase in ENDINGS or self.exit_code is not None

    @property
    def is_running(self) -> bool:
        """Return whether a run was started and is not over."""
        return self.started_time is not None and not self.is_over

    @property
    def is_training(self) -> bool:
        """Return whether steps are being made; pauses to evaluate or save count too."""
        if self.is_over or self.is_worker_down:
            return False
        is_between = self.phase in INTERLUDES and 0 < self.step < self.total_steps
        return self.phase == "training" or is_between

    def checkpoint_age_seconds(self, now: float) -> float | None:
        """Return how long ago the newest checkpoint was saved; `now` is the wall clock."""
        return max(0.0, now - self.checkpoints[-1].saved_time) if self.checkpoints else None

    def planned(self, key: str) -> int:
        """Return a whole number of the plan, 0 where there is none."""
        value = self.plan.get(key)
        return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0

    def _times_left(self, interval_key: str) -> int:
        interval = self.planned(interval_key)
        return max(0, self.total_steps // interval - self.step // interval) if interval > 0 else 0


def fold(status: RunStatus, event: Event) -> RunStatus:
    """Return what is known after the event."""
    if isinstance(event, events.RunStarted) and status.config_digest not in (
        "",
        event.config_digest,
    ):
        status = RunStatus()  # another run in the same folder: nothing carries over
    is_downtime = isinstance(event, events.RunStarted) and event.attempt == 0
    passed = 0.0 if status.last_time is None or is_downtime else event.time - status.last_time
    is_progress = _is_progress(status, event)
    return replace(
        _apply(status, event),
        started_time=event.time if status.started_time is None else status.started_time,
        last_time=event.time,
        progress_time=event.time if is_progress else status.progress_time,
        elapsed_seconds=status.elapsed_seconds + max(0.0, passed),
    )


def replay(lines: Iterable[str]) -> RunStatus:
    """Return the status after the lines of an `events.jsonl`; torn lines are passed over."""
    status = RunStatus()
    for line in lines:
        event = parse_line(line)
        if event is not None:
            status = fold(status, event)
    return status


def _apply(status: RunStatus, event: Event) -> RunStatus:
    match event:
        case events.RunStarted():
            return _started(status, event)
        case events.PhaseChanged(phase=phase, detail=detail):
            if phase == "saving" and status.latest is not None:
                status = replace(status, saving=(*status.saving[-1:], status.latest))
            return replace(status, phase=phase, detail=detail, progress=None, is_worker_down=False)
        case events.Planned(plan=plan):
            return replace(status, plan=plan)
        case events.Progress():
            return replace(status, progress=event)
        case events.StepDone():
            return _stepped(status, event)
        case events.RanksMeasured(ranks=ranks, slowest=slowest):
            return replace(status, ranks=tuple(ranks), slowest_rank=slowest)
        case events.Evaluated():
            return _evaluated(status, event)
        case events.Generated(when=when):
            changed: dict[str, Any] = {f"generated_{when}": event}
            return replace(status, **changed)
        case events.Sample():
            return replace(status, samples=_with_sample(status.samples, event))
        case events.CheckpointSaved():
            return _saved(status, event)
        case events.Resumed(step=step):
            # Steps that were repeated for the recording say nothing of this process's speed.
            rewound = replace(_rewound(status, step), steps_in_attempt=0)
            return replace(rewound, resumed=event, is_worker_down=False)
        case events.Warned(message=message):
            return _warned(status, message[:KEPT_CHARACTERS])
        case events.MemoryReduced():
            return replace(status, plan=with_sizes(status.plan, event))
        case events.Restarted():
            status = replace(status, restarts=_kept((*status.restarts, event)), failure=None)
            return replace(_fresh(status), is_worker_down=True)
        case events.Failed():
            return replace(status, phase="failed", failure=event, is_worker_down=True)
        case events.Finished():
            peak = max(status.peak_memory_bytes, event.peak_memory_bytes)
            status = replace(status, phase="finished", detail="", progress=None)
            return replace(status, finished=event, peak_memory_bytes=peak)
        case events.Stopped():
            return replace(status, phase="stopped", progress=None, stopped=event)
        case events.Ended(exit_code=exit_code):
            return _ended(status, exit_code)
        case _:
            return status


def _is_progress(status: RunStatus, event: Event) -> bool:
    # A worker that only warns, or repeats the same count, makes no progress.
    if isinstance(event, events.Progress) and status.progress is not None:
        return event.done != status.progress.done
    return not isinstance(event, (events.Warned, events.Failed, events.Ended))


def _fresh(status: RunStatus) -> RunStatus:
    """Forget what belonged to the process that is gone."""
    return replace(
        status,
        phase="starting",
        detail="",
        progress=None,
        recent=(),
        steps_in_attempt=0,
        ranks=(),
        slowest_rank=None,
    )


def _started(status: RunStatus, event: events.RunStarted) -> RunStatus:
    return replace(
        _fresh(status),
        run_name=event.run_name,
        config_digest=event.config_digest,
        output_dir=event.output_dir,
        attempt=event.attempt,
        pid=event.pid,
        failure=None,
        finished=None,
        stopped=None,
        exit_code=None,
        # A restarted worker counts as up at its first event, not when its restart is announced.
        is_worker_down=event.attempt > 0,
    )


def _stepped(status: RunStatus, event: events.StepDone) -> RunStatus:
    if event.step <= status.step:  # started over without a checkpoint
        status = _rewound(status, event.step - 1)
    # The first step of a process also warms up: left out as soon as there is another.
    before = () if status.steps_in_attempt == 1 else status.recent
    return replace(
        status,
        phase="training",
        detail=status.detail if status.phase == "training" else "",
        progress=None,
        step=event.step,
        first_loss=event.loss if event.step == 1 else status.first_loss,
        latest=event,
        recent=(*before, event)[-RECENT_STEPS:],
        steps_in_attempt=status.steps_in_attempt + 1,
        stepped_seconds=status.stepped_seconds + event.step_seconds,
        stepped_tokens=status.stepped_tokens + event.tokens,
        peak_memory_bytes=max(status.peak_memory_bytes, event.memory_bytes),
        peak_gpu_memory_bytes=max(status.peak_gpu_memory_bytes, event.gpu_memory_bytes),
        is_worker_down=False,
    )


def _evaluated(status: RunStatus, event: events.Evaluated) -> RunStatus:
    best = status.best_eval
    is_better = math.isfinite(event.eval_loss) and (
        best is None or event.eval_loss < best.eval_loss
    )
    return replace(
        status,
        eval_before=event if event.step == 0 else status.eval_before,
        evals=_kept((*status.evals, event)),
        bests=_kept((*status.bests, event)) if is_better else status.bests,
    )


def _saved(status: RunStatus, event: events.CheckpointSaved) -> RunStatus:
    after = next((s for s in (*status.saving, status.latest) if s and s.step == event.step), None)
    facts = (event.step, event.path, event.bytes, event.seconds, event.is_best)
    saved = Checkpoint(*facts, after, event.time, event.wait_seconds)
    others = tuple(kept for kept in status.checkpoints if kept.step != event.step)
    return replace(status, checkpoints=_kept((*others, saved)))


def _rewound(status: RunStatus, step: int) -> RunStatus:
    """Forget all that came after the step, which the run will do again."""
    at_step = [kept.after for kept in status.checkpoints if kept.step == step]
    is_same = status.latest is not None and status.latest.step == step
    generated = status.generated_after
    return replace(
        status,
        step=step,
        latest=status.latest if is_same else (at_step or [None])[-1],
        recent=(),
        evals=tuple(kept for kept in status.evals if kept.step <= step),
        bests=tuple(kept for kept in status.bests if kept.step <= step),
        checkpoints=tuple(kept for kept in status.checkpoints if kept.step <= step),
        saving=tuple(kept for kept in status.saving if kept.step <= step),
        generated_after=generated if generated and generated.step <= step else None,
        samples=tuple(kept for kept in status.samples if kept.step <= step),
    )


def _warned(status: RunStatus, message: str) -> RunStatus:
    if any(known.message == message for known in status.warnings):
        counted = tuple(
            replace(known, count=known.count + 1) if known.message == message else known
            for known in status.warnings
        )
        return replace(status, warnings=counted)
    if len(status.warnings) >= KEPT_EVENTS:  # the first ones tell more than the last
        return replace(status, warnings_left_out=status.warnings_left_out + 1)
    return replace(status, warnings=(*status.warnings, RunWarning(message)))


def _with_sample(
    samples: tuple[events.Sample, ...], event: events.Sample
) -> tuple[events.Sample, ...]:
    text = {
        name: getattr(event, name)[:KEPT_CHARACTERS] for name in ("prompt", "expected", "answer")
    }
    others = tuple(s for s in samples if (s.when, s.index) != (event.when, event.index))
    return (*others, replace(event, **text))[-2 * KEPT_EVENTS :]


def _ended(status: RunStatus, exit_code: int) -> RunStatus:
    phase: Phase = {0: "finished", 143: "stopped"}.get(exit_code, "failed")  # type: ignore[assignment]
    return replace(status, phase=phase, exit_code=exit_code)


def _kept(newest: tuple[Any, ...]) -> tuple[Any, ...]:
    return newest[-KEPT_EVENTS:]


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
