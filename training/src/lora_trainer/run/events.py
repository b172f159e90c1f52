"""The events that workers send to the supervisor: one JSON object per line.

An event is a frozen dataclass; `event.to_line()` and `parse_line()` are inverse. Every
event carries `time` (seconds since the epoch, wall clock). Events contain no dataset text, except
`Sample`, which shows generated answers to the user's evaluation prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

PROGRESS_SECONDS = 0.5

Phase = Literal[
    "starting", "checking", "loading", "tokenizing", "evaluating", "training", "saving",
    "exporting", "finished", "failed", "stopped",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base class of all events."""

    kind: ClassVar[str] = ""
    time: float = field(default_factory=time.time)

    def to_line(self) -> str:
        """Return the event as one line of JSON, newline included."""
        return json.dumps({"event": self.kind, **asdict(self)}, allow_nan=True) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A run or a restart begins (sent by the supervisor)."""

    kind: ClassVar[str] = "run_started"
    run_name: str
    config_digest: str
    output_dir: str
    attempt: int = 0
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged(Event):
    """The worker enters a phase; `detail` names its subject."""

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
    """One optimizer step; seconds are of this step, memory in bytes.

    In float16 also the loss scale, and the optimizer steps of the run that overflowed, were
    skipped and repeated at a lower one.
    """

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
    loss_scale: float = 0.0  # 0: the precision needs none
    skipped_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFigures:
    """One rank's own work: seconds and tokens, without waiting; memory in bytes."""

    rank: int
    seconds: float
    tokens: int
    memory_bytes: int
    gpu_memory_bytes: int = 0
    micro_batch_examples: int = 0
    micro_batch_tokens: int = 0
    gradient_checkpointing: int = 0  # 1: it is on

    @property
    def tokens_per_second(self) -> float:
        """Return the rank's own speed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksMeasured(Event):
    """The work of each rank since the previous such event, by rank."""

    kind: ClassVar[str] = "ranks"
    step: int
    ranks: list[dict[str, float]]
    slowest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Evaluation metrics at a step."""

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
    """A checkpoint is on disk and verified; its step waited `wait_seconds` of its time."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float
    is_best: bool = False
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """The run resumes from a checkpoint; `skipped` are newer ones that failed verification."""

    kind: ClassVar[str] = "resumed"
    step: int
    path: str
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """A warning, which does not stop the run."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReduced(Event):
    """Memory ran out in the step after `step`, or in its evaluation: the sizes used from now on."""

    kind: ClassVar[str] = "memory"
    step: int
    micro_batch_examples: int
    eval_batch_examples: int
    gradient_checkpointing: bool
    micro_batch_tokens: int = 0  # 0: micro-batches are cut by examples
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(Event):
    """The worker ended without finishing and is restarted (sent by the supervisor)."""

    kind: ClassVar[str] = "restart"
    attempt: int
    cause: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The worker failed: its problems (what, where, why, remedy) and its exit code.

    `retry` is the reason why a retry may succeed; the supervisor decides.
    """

    kind: ClassVar[str] = "failed"
    exit_code: int
    problems: list[dict[str, str]]
    retry: str = ""
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The run is complete; `results` are paths relative to the output directory.

    `adapter_step` is the step whose adapter was exported, `outcome` the content of
    `results.json`, which the supervisor adds.
    """

    kind: ClassVar[str] = "finished"
    step: int
    train_seconds: float
    tokens_seen: int
    peak_memory_bytes: int
    results: list[str]
    adapter_step: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The run was stopped by a signal; the newest checkpoint is of `step`, 0: there is none."""

    kind: ClassVar[str] = "stopped"
    step: int
    signal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """The last event, from the supervisor: the exit code of the whole run."""

    kind: ClassVar[str] = "ended"
    exit_code: int


KINDS: Mapping[str, type[Event]] = {
    event.kind: event
    for event in (
        RunStarted, PhaseChanged, Planned, Progress, StepDone, RanksMeasured, Evaluated,
        Generated, Sample, CheckpointSaved, Resumed, Warned, MemoryReduced, Restarted, Failed,
        Finished, Stopped, Ended,
    )
}  # fmt: skip
HINTS = {
    event: {one.name: get_type_hints(event)[one.name] for one in fields(event)}
    for event in KINDS.values()
}
LARGEST = 2**63 - 1  # a larger number is no count of anything
LATEST_TIME = 1e11  # the year 5138
DEEPEST = 16  # levels of a plan
# Only a diverging run has infinite or NaN values.
DIVERGING = frozenset({"loss", "grad_norm", "eval_loss", "eval_perplexity", "eval_token_accuracy"})


def parse_line(line: str) -> Event | None:
    """Parse a line into an event; None if it is not one (truncated, or something else).

    Fields that this version does not know are left out, so that old readers
    replay newer files. A field of another type makes the line no event. Half of a
    surrogate pair, which no file and no terminal takes, is escaped.
    """
    try:
        raw = json.loads(line)
        kind = KINDS[raw["event"]]
        known = {name: _encodable(raw[name]) for name in HINTS[kind] if name in raw}
        for name, value in known.items():
            may_diverge = name in DIVERGING and isinstance(value, float)
            if not (may_diverge or _is_of(HINTS[kind][name], value)):
                return None
        event = kind(**known)
        return event if 0 <= event.time < LATEST_TIME else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def is_foreign(line: str) -> bool:
    """Return whether a line that is not an event is valid JSON, not a truncated line."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return parse_line(line) is None


def _encodable(value: object) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(one) for name, one in value.items()}
    return [_encodable(one) for one in value] if isinstance(value, list) else value


def _is_of(hint: Any, value: Any) -> bool:
    """Return whether a value of JSON is of a field's type; a whole number is a float too."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return _is_shallow(value, DEEPEST)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return isinstance(value, list) and all(_is_of(inner[0], one) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(inner[1], one) for one in value.values())
    if hint in (int, float):
        is_number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return is_number and abs(value) <= LARGEST  # infinite is more, and NaN is not less
    return isinstance(value, hint)


def _is_shallow(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def progress_of(
    emit: Callable[[Event], None],
    unit: str,
    total: int = 0,
    every_seconds: float = PROGRESS_SECONDS,
) -> Callable[[int], None]:
    """Return what work calls with the units done; it says so twice a second at most."""
    reported = time.monotonic() - PROGRESS_SECONDS

    def report(done: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= every_seconds:
            reported = time.monotonic()
            emit(Progress(done=done, total=total, unit=unit))

    return report
