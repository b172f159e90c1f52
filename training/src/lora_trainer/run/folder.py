"""The output folder of a run: made, checked, locked and archived."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..config.settings import Settings
from ..errors import AccessError, ConfigError, StorageError
from ..host.addresses import default_cache, is_address, joined, local_name
from ..host.disk import sync
from ..run_folder import RunFolder, is_own


def output_folder(settings: Settings) -> Path:
    """Return the local folder of this run's results, mirrored if they go to an object store."""
    output = settings.config.output
    if address := output_address(settings):
        return Path(output.output_cache_dir or default_cache() / "outputs") / local_name(address)
    folder = Path(output.output_dir).absolute()
    return folder / output.run_name if output.run_name else folder


def output_address(settings: Settings) -> str:
    """Return the address of this run's results on an object store; empty for a local folder."""
    output = settings.config.output
    if not is_address(output.output_dir):
        return ""
    address = output.output_dir.rstrip("/")
    return joined(address, output.run_name) if output.run_name else address


def name_of_run(settings: Settings) -> str:
    """Return the run's name: as given, else that of its folder."""
    address = output_address(settings)
    last = address.rpartition("/")[2] if address else output_folder(settings).name
    return settings.config.output.run_name or last


def make_folder(folder: Path) -> None:
    """Create the output folder and check that it is writable.

    Raises:
        AccessError, ConfigError, StorageError: it cannot be, or they cannot.
    """
    with _refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_in(folder)


def check_folder(folder: Path) -> None:
    """Prove that the output folder can be made and written, and leave nothing behind.

    Raises:
        AccessError, ConfigError, StorageError: as for `make_folder`.
    """
    with _refusals(folder):
        _write_in(_existing(folder))


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _write_in(folder: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with tempfile.TemporaryFile(dir=folder, prefix=".writable-") as probe:
        probe.write(b"x")


@contextlib.contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Raise what the system refuses as an error of `output_dir`."""
    try:
        yield
    except PermissionError as error:
        existing = _existing(folder)
        raise AccessError.of(
            "the output folder is not writable",
            where=f"output_dir: {folder}",
            why=f"{error.strerror}, as user {os.getuid()}",
            remedy=f"chmod -R u+rwX {existing}"
            if existing.stat().st_uid == os.getuid()
            else f"sudo chown -R {os.getuid()}:{os.getgid()} {existing}",
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError.of(
            "the output folder is a file",
            where=f"output_dir: {folder}",
            why=f"{error.filename} is not a folder",
            remedy="--output_dir ANOTHER_FOLDER",
        ) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise AccessError.of(
                "the output folder is not writable",
                where=f"output_dir: {folder}",
                why="it is mounted read-only",
                remedy="mount it read-write, or use --output_dir ANOTHER_FOLDER",
            ) from error
        raise StorageError.of(
            "the output folder is not writable",
            where=f"output_dir: {folder}",
            why=error.strerror or str(error),
            remedy=f"df -h {folder.parent}",
        ) from error


def archive(folder: Path) -> Path:
    """Move a run's files to a numbered folder beside it, so that nothing is lost.

    A folder that holds more than this run, such as named runs, keeps the run inside: what is
    not the run's stays where it is. So does a mount point, whose neighbours are other disks.

    The files are gathered in a folder that takes its final name last of all. A kill in between
    leaves that folder behind, by which `finish_archiving` continues.
    """
    gathered = RunFolder(folder).archiving
    gathered.mkdir(exist_ok=True)
    is_alone = True
    for path in sorted(folder.iterdir()):
        if is_own(path.name):
            path.replace(gathered / path.name)
        elif path.name not in (RunFolder.lock, RunFolder.archiving):
            is_alone = False
    sync(gathered)
    sync(folder)
    is_beside = is_alone and not folder.is_mount() and os.access(folder.parent, os.W_OK)
    try:
        aside = _free_name(folder.parent, folder.name) if is_beside else _free_name(folder, "run")
        gathered.replace(aside)
    except OSError as error:
        # A bind mount of the same disk does not look like a mount point.
        if not is_beside or error.errno not in (errno.EXDEV, errno.EACCES, errno.EPERM):
            raise
        aside = _free_name(folder, "run")
        gathered.replace(aside)
    sync(aside.parent)
    return aside


def finish_archiving(folder: Path) -> Path | None:
    """Complete an archiving that was interrupted; return where the run is now, if there was one."""
    gathered = RunFolder(folder).archiving
    return archive(folder) if gathered.is_dir() and not gathered.is_symlink() else None


def _free_name(parent: Path, name: str) -> Path:
    number = 1
    while os.path.lexists(parent / f"{name}.{number}"):
        number += 1
    return parent / f"{name}.{number}"


def open_lock(path: Path) -> IO[str]:
    """Open the lock file for reading and writing, without emptying it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    return os.fdopen(descriptor, "r+")
