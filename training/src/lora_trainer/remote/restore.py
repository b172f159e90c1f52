"""Restore a run from its remote folder to an empty or outdated local one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint_folder import CorruptCheckpointError, listed, name_of, read_state, step_of
from ..host.disk import CHECKSUMS, is_changed
from ..run.events import CheckpointSaved
from ..run.recording import read_events
from ..run_folder import RunFolder, is_own
from . import checkpoints
from .folder import RemoteFolder

# Read by name, because a listing may lag behind what was written.
FILES = (
    RunFolder.digest, RunFolder.resolved, RunFolder.plan, RunFolder.data, RunFolder.environment,
    RunFolder.memory_limits, RunFolder.results, RunFolder.report, RunFolder.loss_chart,
    RunFolder.events, RunFolder.log,
)  # fmt: skip
KNOWN_STEPS = 8  # of the checkpoints in events.jsonl, the newest


def has_run(folder: RemoteFolder) -> bool:
    """Return whether a run has written to the remote folder."""
    return any(folder.read(name) is not None for name in (RunFolder.digest, RunFolder.resolved))


def bring(folder: RemoteFolder, local: Path) -> list[str]:
    """Download what a run needs to resume, or to be recognized as finished; return the problems.

    Raises:
        OSError and others: the store's or the disk's.
    """
    bring_records(folder, local)
    skipped = _bring_checkpoints(folder, local)
    done = folder.read(RunFolder.done)
    if done is not None:
        bring_folder(folder, local, RunFolder.final_model)
        local.joinpath(RunFolder.done).write_bytes(done)  # last of all, as there
    return skipped


def bring_records(folder: RemoteFolder, local: Path) -> None:
    """Download the records of a run, and the adapter that it started from."""
    for name in FILES:
        if (content := folder.read(name)) is not None:
            local.joinpath(name).write_bytes(content)
    bring_folder(folder, local, RunFolder.initial_adapter)


def bring_folder(folder: RemoteFolder, local: Path, name: str) -> None:
    """Download all files of a folder; those that its SHA256SUMS names are verified.

    Raises:
        CorruptCheckpointError: a file is not the one that was uploaded.
    """
    names = set(folder.listed(name))
    if (sums := folder.read(f"{name}/{CHECKSUMS}")) is not None:
        lines = sums.decode("utf-8", "replace").splitlines()
        names |= {f"{name}/{line.partition('  ')[2]}" for line in lines}
        names.add(f"{name}/{CHECKSUMS}")
    for one in sorted(names):
        if ".." not in one.split("/"):
            folder.download(one, local / one)
    for one in sorted(names):
        if is_changed(local / one):
            raise CorruptCheckpointError(f"{one} does not match its {CHECKSUMS}")


def _bring_checkpoints(folder: RemoteFolder, local: Path) -> list[str]:
    """Download the newest checkpoint that verifies, and the best one so far."""
    steps = {*checkpoints.steps_listed(folder), *_recorded_steps(RunFolder(local).events)}
    skipped: list[str] = []
    for step in sorted(steps, reverse=True):
        try:
            checkpoints.download(folder, step, RunFolder(local).checkpoints)
        except CorruptCheckpointError as error:
            if "manifest.json is missing" not in str(error):  # never complete, or removed
                skipped.append(f"{checkpoints.remote_name(step)}: {error}")
            continue
        best = read_state(RunFolder(local).checkpoints / name_of(step))["state"]
        if isinstance(number := best.get("best_step"), int) and number != step and number > 0:
            try:
                checkpoints.download(folder, number, RunFolder(local).checkpoints)
            except CorruptCheckpointError as error:
                skipped.append(f"{checkpoints.remote_name(number)}: {error}")
        break
    return skipped


def _recorded_steps(events: Path) -> list[int]:
    saved = [event.step for event in read_events(events) if isinstance(event, CheckpointSaved)]
    return saved[-KNOWN_STEPS:]


def is_subsumed(folder: RemoteFolder, local: Path) -> bool:
    """Return whether the remote folder has the same run, at least as far."""
    try:
        is_same = folder.read(RunFolder.digest) == RunFolder(local).digest.read_bytes()
    except OSError:
        return False
    here = [step_of(path.name) or 0 for path in listed(RunFolder(local).checkpoints)]
    there = checkpoints.steps_listed(folder)
    return is_same and max(there, default=0) >= max(here, default=0)


def clear(local: Path, kept: Sequence[str] = ()) -> None:
    """Remove a run's own files from its local folder."""
    for path in local.iterdir():
        if is_own(path.name) and path.name not in kept:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
