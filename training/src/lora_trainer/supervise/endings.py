"""How a worker ended, and the error and the results that a run ends with after it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..checkpoint_folder import listed, step_of
from ..errors import (
    ERRORS_BY_CODE,
    InternalError,
    MemoryKilledError,
    Problem,
    StoppedError,
    TrainerError,
)
from ..faults import limit_in_log
from ..redaction import Redaction
from ..report.html import write_report
from ..run import lock
from ..run.events import Failed, Finished
from ..run.memory_limits import why_nothing_fits
from ..run.protocol import PEER_LOST
from ..run.results import refusal, results_of, write_results
from ..run.status import RunStatus, fold
from ..run_folder import RunFolder

# A retry would end with the same of these exit codes.
FINAL_CODES = frozenset({0, 65, 69, 74, 75, 77, 78, 137, 143})


LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a worker ended: its exit code, that as text, and what it reported of its failure."""

    code: int
    cause: str
    failure: Failed | None = None
    is_out_of_memory: bool = False


def saved_step(output_dir: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    try:
        folders = [path for path in listed(RunFolder(output_dir).checkpoints) if path.is_dir()]
    except OSError:
        return 0
    return (step_of(folders[-1].name) or 0) if folders else 0


def is_recorded_at_once(failure: Failed) -> bool:
    """Return whether a failure is final: no retry, and no plan figures to add."""
    return not failure.retry and failure.exit_code != MemoryKilledError.exit_code


def failure_in_log(code: int, log: Path, begin: int) -> Failed | None:
    """Return the failure behind the last log lines of a worker that died without a report.

    Native libraries abort the process if they get no memory or no thread.
    """
    if code in (0, 143, -signal.SIGKILL, PEER_LOST):
        return None
    try:
        with log.open("rb") as file:
            file.seek(max(begin, log.stat().st_size - LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    fault = limit_in_log(text)
    if fault is None:
        return None
    problems = [asdict(problem) for problem in fault.problems]
    return Failed(exit_code=fault.exit_code, problems=problems, retry=fault.retry)


def failed(failure: Failed, status: RunStatus) -> TrainerError:
    """Return the error that the worker reported; if out of memory, with a plan that fits."""
    problems = [Problem(**problem) for problem in failure.problems]
    if failure.exit_code == MemoryKilledError.exit_code and status.plan:
        why, remedy = why_nothing_fits(status.plan)
        problems[0] = replace(problems[0], why=f"{problems[0].why}; {why}", remedy=remedy)
    return ERRORS_BY_CODE.get(failure.exit_code, InternalError)(problems)


def stopped(status: RunStatus, output_dir: Path) -> TrainerError:
    """Return the error of a run stopped by a signal; it states the lost steps."""
    done, saved = status.step, saved_step(output_dir)
    why = "received a stop signal before the first step"
    if done > saved:
        steps = f"step {done} is" if done == saved + 1 else f"steps {saved + 1} to {done} are"
        latest = f"the latest checkpoint is of step {saved}" if saved else "there is no checkpoint"
        why = f"received a stop signal; {steps} not saved and will be repeated: {latest}"
    elif saved:
        why = f"received a stop signal; progress is saved in the checkpoint of step {saved}"
    return StoppedError.of(
        f"stopped at step {done}" if done else "stopped",
        where=str(output_dir),
        why=why,
        remedy="run the same command again: it resumes by itself",
    )


def given_up(end: WorkerEnd, status: RunStatus, output_dir: Path, why: str) -> TrainerError:
    """Return the error of a worker that ended by itself and is not restarted."""
    is_killed = end.code in (137, -signal.SIGKILL)
    if end.is_out_of_memory and status.plan:
        numbers, remedy = why_nothing_fits(status.plan)
        return MemoryKilledError.of(
            f"the worker {end.cause}", where=f"step {status.step + 1}", why=numbers, remedy=remedy
        )
    return (MemoryKilledError if is_killed else InternalError).of(
        f"the worker {end.cause}",
        where=f"step {status.step}",
        why=why or "it did not report a reason",
        remedy=f"see {RunFolder(output_dir).log}; lower per_device_train_batch_size or "
        "max_seq_length if memory is short; start again to resume",
    )


def with_outcome(event: Finished, status: RunStatus, folder: Path) -> Finished:
    """Return the event with the content that `results.json` is going to have."""
    finished = replace(fold(status, event), exit_code=0)
    return replace(event, outcome=asdict(results_of(finished, folder)))


def leave_results(
    folder: Path, status: RunStatus, problems: Sequence[Problem], redaction: Redaction
) -> None:
    """Write the results of a run that has ended; of one without an exit code, nothing.

    Raises:
        OSError: the disk does not take them.
    """
    if status.exit_code is not None:
        results = results_of(status, folder, problems)
        write_results(folder, redaction.value(asdict(results)))


def leave_all(
    folder: Path,
    status: RunStatus,
    problems: Sequence[Problem],
    redaction: Redaction,
    warn: Callable[[str], None],
) -> None:
    """Write results and report; a failure is a warning, and does not fail the run."""
    for name, write in (
        (RunFolder.results, lambda: leave_results(folder, status, problems, redaction)),
        ("report", lambda: write_report(folder)),
    ):
        try:
            write()
        except Exception as error:
            warn(f"no {name} was written: {type(error).__name__}: {error}")


def left_to_launcher(cause: str, is_memory: bool, launcher: str) -> TrainerError:
    """Return the error of a worker that only the launcher can start again, with all others."""
    return (MemoryKilledError if is_memory else InternalError).of(
        cause,
        where="processes that train together",
        why="all of them have to start again",
        remedy=f"{launcher} does it where restarts are allowed (torchrun --max-restarts); else "
        "run the same command again: the run resumes from its last checkpoint",
    )


def leave_refusal(folder: Path, run_name: str, error: TrainerError, redaction: Redaction) -> None:
    """Write the results of a start that was refused, where there is a folder that is free."""
    if folder.is_dir():
        results = refusal(run_name, error.exit_code, error.problems)
        with contextlib.suppress(OSError, TrainerError):
            lock.check_free(folder)
            write_results(folder, redaction.value(asdict(results)))
