"""What every writer needs: names and content that outlive a power cut, modes by the umask.

Imports nothing of the package.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
