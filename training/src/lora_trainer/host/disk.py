"""Durable writes: files and names survive a power cut; permissions follow the umask.

Imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
BLOCK_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: neither a reader nor a power cut leaves half of it."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text atomically as UTF-8; lone surrogates become question marks."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def follow_umask(folder: Path) -> None:
    """Apply the umask to a folder and its content, as plain `open` and `mkdir` would.

    safetensors and `tempfile` create files that only their owner can read, so that a server of
    another user could not read the adapter. Only for folders that this process has just created.

    Raises:
        OSError: a test file could not be written there.
    """
    # Reading the umask means setting it, which would affect other threads.
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
    """Write the hashes of a folder's files, for `sha256sum --check SHA256SUMS` and readers.

    The model card is left out, because its figures may be added later.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [path for path in files if path.name not in (CHECKSUMS, "README.md")]
    lines = [f"{_sha256(path)}  {path.name}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def is_changed(path: Path) -> bool:
    """Return whether a file differs from the hash stored beside it; False if there is no hash."""
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
