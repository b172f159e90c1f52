"""What every writer needs: names and content that outlive a power cut, modes by the umask.

Imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
BLOCK_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one move, so that neither a reader nor a power cut meets half of it."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 in one move; half of a surrogate pair becomes a question mark."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def follow_umask(folder: Path) -> None:
    """Give a folder and all that is in it the modes that a plain `open` and `mkdir` give here.

    safetensors and `tempfile` make files that only their owner can read; a server that runs as
    another user then finds no adapter. Only for folders that this process has just made.

    Raises:
        OSError: a probe could not be written there.
    """
    # The umask cannot be read without setting it, which other threads would notice.
    probe_file, probe_folder = folder / ".mode", folder / ".mode.d"
    probe_file.touch()
    probe_folder.mkdir()
    try:
        file_mode = probe_file.stat().st_mode & 0o777
        folder_mode = probe_folder.stat().st_mode & 0o777
    finally:
        probe_file.unlink()
        probe_folder.rmdir()
    for parent, _, names in os.walk(folder):
        _set_mode(Path(parent), folder_mode)
        for name in names:
            _set_mode(Path(parent) / name, file_mode)


def _set_mode(path: Path, mode: int) -> None:
    if not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)


def write_checksums(folder: Path) -> None:
    """Write down the hashes of a folder's files, for `sha256sum --check SHA256SUMS` and readers.

    The model card is left out: its figures may follow later.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [path for path in files if path.name not in (CHECKSUMS, "README.md")]
    lines = [f"{_sha256(path)}  {path.name}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def is_changed(path: Path) -> bool:
    """Tell whether a file is not the one whose hash is beside it; False if none is."""
    recorded = recorded_checksum(path)
    return recorded is not None and _sha256(path) != recorded


def recorded_checksum(path: Path) -> str | None:
    """Return the sha256 of a file that `write_checksums` recorded; None if there is none."""
    try:
        text = (path.parent / CHECKSUMS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    hashes = {name: digest for digest, _, name in (one.partition("  ") for one in text.split("\n"))}
    return hashes.get(path.name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
