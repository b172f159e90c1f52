"""`results.json`: how a run ended and its main figures, for scripts and comparisons.

The supervisor writes it when a run ends, however it ends. It is a summary of `events.jsonl`,
which stays the source: `read_results` makes the same summary for a run that left none,
because it is still going on or was killed. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ..errors import Problem
from ..host.disk import recorded_checksum, write_json
from ..run_folder import RunFolder
from .events import Evaluated, Generated
from .recording import read_events
from .status import RunStatus, fold

Outcome = Literal["finished", "failed", "stopped", "refused", "unfinished"]
WEIGHTS = "adapter_model.safetensors"
STOPPED = 143


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures on the held-out rows; those that were not measured, or not finite, are None."""

    step: int
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    eval_token_accuracy: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True, slots=True)
class RunResults:
    """How a run ended. Only `read_results` returns `unfinished`: no such file is written.

    `evaluation_after` is of the exported adapter, whose step is `adapter_step`; of a run that
    exported none, the last evaluation. A loss that is NaN or infinite is None.

    Units: seconds without the time between two starts; bytes; times since the epoch.
    """

    status: Outcome
    exit_code: int | None = None
    run_name: str = ""
    config_digest: str = ""
    steps: int = 0
    total_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    evaluation_before: Evaluation | None = None
    evaluation_after: Evaluation | None = None
    best_step: int | None = None
    best_eval_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    tokens_per_second: float | None = None
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int = 0
    restarts: int = 0
    warnings: int = 0
    started_time: float | None = None
    ended_time: float | None = None
    adapter: str | None = None
    adapter_step: int | None = None
    adapter_sha256: str | None = None
    problems: list[dict[str, str]] = field(default_factory=list)


def results_of(status: RunStatus, folder: Path, problems: Sequence[Problem] = ()) -> RunResults:
    """Return the results of a run; its adapter's hash is the one that the export recorded."""
    finished, latest, best = status.finished, status.latest, status.best_eval
    reported = [asdict(one) for one in problems]
    if not reported and status.failure is not None:
        reported = status.failure.problems
    step = finished.adapter_step if finished else None
    return RunResults(
        status=_outcome(status),
        exit_code=status.exit_code,
        run_name=status.run_name,
        config_digest=status.config_digest,
        steps=status.step,
        total_steps=status.total_steps,
        first_loss=_finite(status.first_loss),
        last_loss=_finite(status.last_loss),
        evaluation_before=_evaluation(status.eval_before, status.generated_before),
        evaluation_after=_evaluation(_evaluation_at(status, step), status.generated_after),
        best_step=best.step if best else None,
        best_eval_loss=best.eval_loss if best else None,
        tokens=latest.tokens_seen if latest else 0,
        seconds=status.elapsed_seconds,
        train_seconds=finished.train_seconds if finished else status.stepped_seconds,
        tokens_per_second=status.mean_tokens_per_second,
        peak_memory_bytes=status.peak_memory_bytes,
        peak_gpu_memory_bytes=status.peak_gpu_memory_bytes,
        restarts=len(status.restarts),
        warnings=sum(warning.count for warning in status.warnings),
        started_time=status.started_time,
        ended_time=status.last_time if status.is_over else None,
        adapter=RunFolder.final_model if finished else None,
        adapter_step=step,
        adapter_sha256=recorded_checksum(RunFolder(folder).final_model / WEIGHTS)
        if finished
        else None,
        problems=reported,
    )


def refusal(run_name: str, exit_code: int, problems: Sequence[Problem]) -> RunResults:
    """Return the results of a run that was refused before it began."""
    reported = [asdict(one) for one in problems]
    return RunResults("refused", exit_code, run_name, problems=reported)


def write_results(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `results.json` whole or not at all; `content` is the dict of a `RunResults`."""
    write_json(RunFolder(folder).results, content)


def read_results(folder: Path) -> RunResults | None:
    """Return the results of the run in a folder, None where there is no run.

    Without a `results.json` that can be read, they come from `events.jsonl`.
    """
    try:
        content = json.loads(RunFolder(folder).results.read_text(encoding="utf-8"))
        return _reader().validate_python(content)
    except (OSError, ValueError, RecursionError, ValidationError):
        pass
    status = RunStatus()
    for event in read_events(RunFolder(folder).events):
        status = fold(status, event)
    return results_of(status, folder) if status.started_time is not None else None


@cache
def _reader() -> TypeAdapter[RunResults]:
    return TypeAdapter(RunResults)


def _outcome(status: RunStatus) -> Outcome:
    if status.exit_code is None:
        return "finished" if status.phase == "finished" else "unfinished"
    return {0: "finished", STOPPED: "stopped"}.get(status.exit_code, "failed")  # type: ignore[return-value]


def _evaluation_at(status: RunStatus, step: int | None) -> Evaluated | None:
    """Return the evaluation of the exported adapter's step, otherwise the last one."""
    after = [one for one in (*status.bests, *status.evals) if one is not status.eval_before]
    return next((one for one in after if one.step == step), after[-1] if after else None)


def _evaluation(measured: Evaluated | None, answered: Generated | None) -> Evaluation | None:
    if measured is None and answered is None:
        return None
    names = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
    figures = {name: _finite(getattr(measured, name, None)) for name in names}
    step = measured.step if measured else answered.step if answered else 0
    return Evaluation(step, **figures, exact_match=answered.exact_match if answered else None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
