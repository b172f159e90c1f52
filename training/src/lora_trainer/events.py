"""The vocabulary that the worker speaks and the supervisor understands: one JSON object a line.

An event is a frozen dataclass; `event.to_line()` and `parse_line()` are inverse. Every
event carries `time` (seconds since the epoch, wall clock). Only the worker's and the
supervisor's facts are in here: no dataset text, except in `Sample`, which shows
generations for evaluation prompts that the user named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

PROGRESS_SECONDS = 0.5

Phase = Literal[
    "starting", "checking", "loading", "tokenizing", "evaluating", "training", "saving",
    "exporting", "finished", "failed", "stopped",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened, and when."""

    kind: ClassVar[str] = ""
    time: float = field(default_factory=time.time)

    def to_line(self) -> str:
        """Return the event as one line of JSON, newline included."""
        return json.dumps({"event": self.kind, **asdict(self)}, allow_nan=True) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A run, or a restart of one, begins (said by the supervisor)."""

    kind: ClassVar[str] = "run_started"
    run_name: str
    config_digest: str
    output_dir: str
    attempt: int = 0
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged(Event):
    """The worker enters a phase; `detail` says on what."""

    kind: ClassVar[str] = "phase"
    phase: Phase
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """The plan: every number resolved, as in plan.json."""

    kind: ClassVar[str] = "plan"
    plan: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """Work within a phase other than training: `done` of `total` units (0: unknown)."""

    kind: ClassVar[str] = "progress"
    done: int
    total: int = 0
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """One optimizer step; seconds are of this step, memory in bytes."""

    kind: ClassVar[str] = "step"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    step_seconds: float
    tokens: int
    trained_tokens: int
    tokens_seen: int
    memory_bytes: int
    gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFigures:
    """One rank's own work: its seconds and tokens, without waiting; its memory in bytes."""

    rank: int
    seconds: float
    tokens: int
    memory_bytes: int
    gpu_memory_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Return the rank's own speed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksMeasured(Event):
    """What each of several ranks did since the last such event, in order of rank."""

    kind: ClassVar[str] = "ranks"
    step: int
    ranks: list[dict[str, float]]
    slowest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Held-out figures at a step."""

    kind: ClassVar[str] = "eval"
    step: int
    eval_loss: float
    eval_perplexity: float
    eval_token_accuracy: float
    eval_tokens: int
    eval_seconds: float
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Event):
    """Held-out answers compared with the expected ones: the before/after table."""

    kind: ClassVar[str] = "generated"
    step: int
    when: Literal["before", "after"]
    exact_match: float
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Event):
    """One held-out prompt with its expected and its generated answer."""

    kind: ClassVar[str] = "sample"
    step: int
    when: Literal["before", "after"]
    index: int
    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is on disk and verified."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """The run goes on from a checkpoint; `skipped` are newer ones that did not verify."""

    kind: ClassVar[str] = "resumed"
    step: int
    path: str
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something the user should know that does not stop the run."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(Event):
    """The worker ended without finishing and is started again (said by the supervisor)."""

    kind: ClassVar[str] = "restart"
    attempt: int
    cause: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The worker gives up: its problems (what, where, why, remedy) and its exit code."""

    kind: ClassVar[str] = "failed"
    exit_code: int
    problems: list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The run is complete; `results` are paths relative to the output directory."""

    kind: ClassVar[str] = "finished"
    step: int
    train_seconds: float
    tokens_seen: int
    peak_memory_bytes: int
    results: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The run was stopped by a signal after saving at `step`."""

    kind: ClassVar[str] = "stopped"
    step: int
    signal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """The supervisor's last word: the exit code of the whole run."""

    kind: ClassVar[str] = "ended"
    exit_code: int


KINDS: Mapping[str, type[Event]] = {
    event.kind: event
    for event in (
        RunStarted, PhaseChanged, Planned, Progress, StepDone, RanksMeasured, Evaluated,
        Generated, Sample, CheckpointSaved, Resumed, Warned, Restarted, Failed, Finished,
        Stopped, Ended,
    )
}  # fmt: skip
FIELDS = {event: frozenset(f.name for f in fields(event)) for event in KINDS.values()}


def parse_line(line: str) -> Event | None:
    """Return the event of a line, None for a line that is not one (torn, or from elsewhere).

    Fields that this version does not know are left out, so that old readers
    replay newer files.
    """
    try:
        raw = json.loads(line)
        kind = KINDS[raw["event"]]
        known = FIELDS[kind]
        return kind(**{name: value for name, value in raw.items() if name in known})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def progress_of(emit: Callable[[Event], None], unit: str, total: int = 0) -> Callable[[int], None]:
    """Return what work calls with the units done; it says so twice a second at most."""
    told = 0.0

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            emit(Progress(done=done, total=total, unit=unit))

    return tell
