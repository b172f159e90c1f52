"""Remove a run: `lora-trainer rm`. Only what a run writes goes; what is not known stays."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import typer

from ..checkpoint_folder import NAME, TEMPORARY_NAME
from ..errors import ConfigError
from ..faults import disk_fault
from ..host.disk import CHECKSUMS
from ..host.quoting import shell_word
from ..run.lock import check_free, hold
from ..run.summary import own_entries
from ..run_folder import RunFolder
from ..units import size

TENSORBOARD = "events.out.tfevents."
# What the other trackers make in `logs`.
TRACKERS = frozenset({"mlflow.db", "mlflow-artifacts", "trackio", "wandb", "tracker-ids.json"})


def remove_run(folder: Path, *, is_sure: bool) -> None:
    """Remove a run's files, and its folder where nothing else is in it; ask before.

    Raises:
        BusyError: the run is going on.
        ConfigError: nobody can be asked, and `is_sure` is not set.
        AccessError, StorageError: a file cannot be removed.
    """
    check_free(folder)
    files, kept = written_by(folder)
    total = size(sum(path.lstat().st_size for path in files))
    if not is_sure and not _agrees(f"remove {len(files)} files ({total}) of {folder}?", folder):
        typer.echo("nothing was removed")
        return
    try:
        with hold(folder):
            for path in files:
                path.unlink(missing_ok=True)
            _remove_empty(folder)
        RunFolder(folder).lock.unlink(missing_ok=True)
    except OSError as error:
        raise disk_fault(error, str(folder)) or error from error
    with contextlib.suppress(OSError):  # other things are in it, or it is a mount point
        folder.rmdir()
    typer.echo(f"removed {len(files)} files ({total}) of {folder}")
    if kept:
        shown = ", ".join(str(path.relative_to(folder)) for path in kept[:5])
        more = f" and {len(kept) - 5} more" if kept[5:] else ""
        typer.echo(f"kept, since no run writes it: {shown}{more}")


def written_by(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files in a run's folders that it wrote, and those in them that it did not."""
    written: list[Path] = []
    kept: list[Path] = []
    for entry in own_entries(folder):
        if entry.is_symlink() or not entry.is_dir():
            written.append(entry)
            continue
        for path in sorted(_leaves(entry)):
            is_own = _is_own(entry, path.relative_to(entry))
            (written if is_own else kept).append(path)
    return written, kept


def _leaves(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _is_own(entry: Path, path: Path) -> bool:
    """Return whether a file in one of a run's folders is the run's."""
    match entry.name:
        case RunFolder.checkpoints:
            name = path.parts[0]
            return any(one.fullmatch(name) for one in (NAME, TEMPORARY_NAME))
        case name if name == RunFolder.final_model:
            return len(path.parts) == 1 and path.name in _exported(entry)
        case RunFolder.tracker_logs:
            return path.name.startswith(TENSORBOARD) or path.parts[0] in TRACKERS
    return True


def _exported(final: Path) -> set[str]:
    """Return the names of the files that an export wrote; of an older one, all there are."""
    try:
        lines = (final / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {path.name for path in final.iterdir()}
    return {line.partition("  ")[2] for line in lines} | {CHECKSUMS, "README.md"}


def _remove_empty(folder: Path) -> None:
    """Remove the folders of a run that have become empty."""
    for entry in own_entries(folder):
        if entry.is_symlink() or not entry.is_dir():
            continue
        below = [path for path in entry.rglob("*") if path.is_dir() and not path.is_symlink()]
        for path in (*sorted(below, reverse=True), entry):
            with contextlib.suppress(OSError):  # something else is in it
                path.rmdir()


def _agrees(question: str, folder: Path) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError.of(
            "removing a run has to be confirmed",
            where=str(folder),
            why="standard input is no terminal, so that nobody can be asked",
            remedy=f"lora-trainer rm {shell_word(folder)} --yes",
        )
    return typer.confirm(question)
