"""The runs in a folder, and what each came to: state, steps, losses, duration, size.

All of it follows from what a run leaves in its folder, so that a run is listed the same while it
trains, after it was killed, and on another machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..run_folder import RunFolder, is_own
from .history import History
from .lock import is_held, own_address
from .recording import read_events
from .results import RunResults, read_results, results_of
from .status import RunStatus, fold

State = Literal["running", "finished", "failed", "stopped", "interrupted"]
MARKS = (RunFolder.events, RunFolder.resolved, RunFolder.done)  # any of them makes a folder a run's
SHOWN_NAMES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run; a figure that it does not have is None.

    Units: seconds, bytes, times since the epoch. `eval_loss` and `exact_match` are of the exported
    adapter, before there is one the latest. A figure that is not finite is None.
    """

    name: str
    folder: str
    state: State
    exit_code: int | None
    step: int
    total_steps: int
    first_loss: float | None
    last_loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    exact_match_before: float | None
    exact_match: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int
    started_time: float | None
    seconds: float
    bytes: int
    url: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values of JSON."""
        return asdict(self)


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run's files, or the results of one."""
    if any((folder / name).is_file() for name in MARKS):
        return True
    results = read_results(folder)
    return results is not None and results.status != "refused"


def run_folders(parent: Path) -> dict[str, Path]:
    """Return the runs in a folder by name; one in the folder itself is named `.`."""
    runs = {".": parent} if is_run(parent) else {}
    try:
        children = sorted(path for path in parent.iterdir() if not path.name.startswith("."))
    except OSError:
        return runs
    return runs | {path.name: path for path in children if is_run(path)}


def find_run(named: str, outputs: Path) -> Path:
    """Return the folder of a run that is named by its path, or by its name in `outputs`.

    Raises:
        ConfigError: there is no such run.
    """
    path = Path(named).expanduser()
    for folder in (path, outputs / path):
        if is_run(folder):
            return folder.absolute()
    names = list(run_folders(path if path.is_dir() else outputs))
    raise ConfigError.of(
        "there is no such run",
        where=named,
        why=f"neither {path.absolute()} nor {(outputs / path).absolute()} holds a run's "
        f"{RunFolder.events}"
        + (f"; runs there: {', '.join(names[:SHOWN_NAMES])}" if names else ""),
        remedy=f"lora-trainer runs {path if path.is_dir() else outputs}",
    )


def read_run(folder: Path, capacity: int | None = None) -> tuple[RunStatus, History]:
    """Return what a folder's recording adds up to; `capacity` bounds the points of its history."""
    status, history = RunStatus(), History() if capacity is None else History(capacity)
    for event in read_events(RunFolder(folder).events):
        status = fold(status, event)
        history.add(event)
    return status, history


def summarize(name: str, folder: Path) -> RunSummary:
    """Return what a run came to, or has come to so far."""
    results = None if is_held(folder) else read_results(folder)
    if results is None or results.status == "refused":  # going on, or refused at a later start
        status, _ = read_run(folder)
        results = results_of(status, folder)
    state = state_of(folder, results)
    before, after = results.evaluation_before, results.evaluation_after
    return RunSummary(
        name=name,
        folder=str(folder),
        state=state,
        exit_code=0 if state == "finished" else results.exit_code,
        step=results.steps,
        total_steps=results.total_steps,
        first_loss=results.first_loss,
        last_loss=results.last_loss,
        eval_loss_before=before.eval_loss if before else None,
        eval_loss=after.eval_loss if after else None,
        best_eval_loss=results.best_eval_loss,
        best_step=results.best_step,
        exact_match_before=before.exact_match if before else None,
        exact_match=after.exact_match if after else None,
        tokens_per_second=results.tokens_per_second,
        peak_memory_bytes=results.peak_gpu_memory_bytes or results.peak_memory_bytes,
        started_time=results.started_time,
        seconds=results.seconds,
        bytes=sum(path.lstat().st_size for path in files_of(folder)),
        url=own_address(folder) if state == "running" else "",
    )


def summaries(parent: Path) -> list[RunSummary]:
    """Return the runs in a folder, the one that was started last first."""
    runs = [summarize(name, folder) for name, folder in run_folders(parent).items()]
    return sorted(runs, key=lambda run: run.started_time or 0.0, reverse=True)


def state_of(folder: Path, results: RunResults) -> State:
    """Return a run's state by its results, its `DONE` and the process that holds its lock."""
    if results.exit_code is None and is_held(folder):
        return "running"
    if RunFolder(folder).done.is_file():
        return "finished"
    if results.status in ("finished", "failed", "stopped"):
        return results.status
    return "interrupted"


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files that a run wrote; links are named and not followed."""
    for path in own_entries(folder):
        if path.is_symlink() or not path.is_dir():
            yield path
            continue
        for parent, folders, names in os.walk(path):
            links = [name for name in folders if (Path(parent) / name).is_symlink()]
            yield from (Path(parent) / name for name in (*names, *links))


def own_entries(folder: Path) -> list[Path]:
    """Return what a run wrote directly in its folder; its lock is not among it."""
    try:
        return sorted(path for path in folder.iterdir() if _is_runs(path.name))
    except OSError:
        return []


def _is_runs(name: str) -> bool:
    return name != RunFolder.lock and (
        is_own(name) or name in (RunFolder.archiving, RunFolder.server)
    )
