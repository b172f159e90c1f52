"""The folder of one checkpoint: its name, its files and their verification.

A checkpoint's path may hold anything. Whatever is not a plain folder with exactly the expected
plain files is rejected by name: links are not followed, reading a pipe never blocks, and only files
that this program wrote are removed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

STATE = "state.json"
FILES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors", STATE)
MANIFEST = "manifest.json"
TEMPORARY = ".writing-"
NAME = re.compile(r"step-([0-9]{6,})")
TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}step-[0-9]{{6,}}(\.[0-9]+)?")
LARGEST_MANIFEST, LARGEST_STATE = 1 << 16, 1 << 28
BLOCK = 1 << 20
KINDS = {stat.S_IFLNK: "a link", stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe"}


class CorruptCheckpointError(Exception):
    """A checkpoint failed verification; the text gives the reason."""


class UnreadableCheckpointError(CorruptCheckpointError):
    """A checkpoint may be valid, but this user has no permission to read it."""


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint name; None for any other name."""
    matched = NAME.fullmatch(name)
    step = int(matched[1]) if matched else -1
    return step if step >= 0 and name_of(step) == name else None


def listed(folder: Path) -> list[Path]:
    """Return every path named like a checkpoint, by step, whatever it is.

    Raises:
        OSError: the folder exists but cannot be listed.
    """
    try:
        steps = {
            step: path for path in folder.iterdir() if (step := step_of(path.name)) is not None
        }
    except FileNotFoundError:
        return []
    return [steps[step] for step in sorted(steps)]


def has_any(folder: Path) -> bool:
    """Return whether anything in a folder is named like a checkpoint."""
    with contextlib.suppress(OSError):
        return bool(listed(folder))
    return False


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UnreadableCheckpointError: this user has no permission to read it.
        CorruptCheckpointError: it is not a folder, or a file is missing or has another size or
        content.
    """
    with _explained():
        _refuse_what_is_not_ours(path)
        manifest = json.loads(_read(path / MANIFEST, LARGEST_MANIFEST))
        if not isinstance(manifest, dict) or set(manifest) != set(FILES):
            raise CorruptCheckpointError(f"{MANIFEST} does not list the files of a checkpoint")
        for name, entry in manifest.items():
            with _opened(path / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise CorruptCheckpointError(
                        f"{name} has {size} bytes instead of {entry['bytes']}"
                    )
                if _sha256(file) != entry["sha256"]:
                    raise CorruptCheckpointError(f"{name} has changed since it was written")


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json, unverified.

    Raises:
        CorruptCheckpointError: it is not a JSON object with a state.
    """
    with _explained():
        raw = json.loads(_read(path / STATE, LARGEST_STATE))
    if not isinstance(raw, dict) or not isinstance(raw.get("state"), dict):
        raise CorruptCheckpointError(f"{STATE} contains no state")
    return raw


def state_of_ours(path: Path, digest: str) -> dict[str, Any] | None:
    """Return the state of a checkpoint of this run, verified or not; None for anything else."""
    try:
        _refuse_what_is_not_ours(path)
        raw = read_state(path)
    except (CorruptCheckpointError, OSError):
        return None
    state: dict[str, Any] = raw["state"]
    is_ours = raw.get("digest") == digest and state.get("step") == step_of(path.name)
    return state if is_ours else None


def remove(path: Path) -> None:
    """Remove a checkpoint's files as far as possible; keep the folder if it has other files."""
    with contextlib.suppress(OSError):
        if path.is_symlink():
            return
        for name in (MANIFEST, *FILES):
            with contextlib.suppress(FileNotFoundError):
                (path / name).unlink()
        path.rmdir()


def remove_temporaries(folder: Path) -> None:
    """Remove incomplete checkpoints that a kill left behind."""
    for path in folder.iterdir():
        if TEMPORARY_NAME.fullmatch(path.name):
            remove(path)


def make_temporary(folder: Path, name: str) -> Path:
    """Create an empty temporary folder for a checkpoint and return it."""
    number = 1
    while True:
        temporary = folder / f"{TEMPORARY}{name}{f'.{number}' if number > 1 else ''}"
        try:
            temporary.mkdir()
            return temporary
        except FileExistsError:  # belongs to the user
            number += 1


def set_aside(path: Path) -> Path:
    """Rename a foreign file or folder at a checkpoint's path; return its new path."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.aside-{number}")):
        number += 1
    path.replace(aside)
    return aside


def _refuse_what_is_not_ours(path: Path) -> None:
    kind = stat.S_IFMT(path.lstat().st_mode)
    if kind != stat.S_IFDIR:
        raise CorruptCheckpointError(f"it is {KINDS.get(kind, 'no folder')}, not a checkpoint")
    with os.scandir(path) as entries:
        inside = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    for name in sorted(inside.keys() - {*FILES, MANIFEST}):
        raise CorruptCheckpointError(f"{name} is not a checkpoint file; it was not opened")
    for name in sorted(name for name, is_plain in inside.items() if not is_plain):
        raise CorruptCheckpointError(f"{name} is not a plain file; it was not opened")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    # Neither follows a link nor blocks on a pipe that has just replaced the file.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CorruptCheckpointError(f"{path.name} is not a plain file")
        yield file


def _read(path: Path, most: int) -> bytes:
    with _opened(path) as file:
        # Python allocates as much memory as it is asked to read.
        return file.read(min(most, os.fstat(file.fileno()).st_size))


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn any error raised while reading a checkpoint into the reason why it is invalid."""
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{Path(str(error.filename)).name} is missing") from error
    except PermissionError as error:
        raise UnreadableCheckpointError(f"no permission, as user {os.getuid()}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"unreadable: {type(error).__name__}") from error
