"""Remove caches and what dead processes left: `lora-trainer clean`; see docs/disk.md.

Everything removed here is made again when it is needed. Results, checkpoints, environments and
the Hugging Face cache, which other programs share, stay. Needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from ..config.settings import Settings
from ..data.fingerprint import MEMORY_NAME
from ..errors import AccessError
from ..host import scratch
from ..host.addresses import default_cache
from ..model import embedded, load
from ..remote import copies
from ..units import size

ENTRY = re.compile(r"[0-9a-f]{32}")  # a tokenized dataset
TOKENIZER = re.compile(r"[0-9a-f]{16}")
MAPPED = re.compile(r"^\S+ \S+ \S+ \S+ \S+ +(/.+)$", re.M)  # a line of /proc/PID/maps
# Where a container's caches are on the host: LORA_MODELS of the compose file.
CONTAINER_CACHE = Path(__file__).parents[3] / "models" / "lora-trainer"


@dataclass(frozen=True, slots=True)
class Removable:
    """A file or folder that can be made again, and what it is."""

    path: Path
    what: str

    def size_bytes(self) -> int:
        """Return what it takes on the disk."""
        paths = [self.path, *self.path.rglob("*")] if self.path.is_dir() else [self.path]
        return sum(path.lstat().st_blocks * 512 for path in paths if os.path.lexists(path))


def clean(settings: Settings, *, is_dry_run: bool) -> None:
    """Remove the caches that these settings name, and the temporary folders of dead processes.

    Raises:
        AccessError: some could not be removed.
    """
    used = _mapped_files()
    total, refused = 0, []
    for one in removable(settings):
        count = one.size_bytes()
        row = f"{size(count):>9}  {one.path}  ({one.what})"
        if any(path.is_relative_to(one.path) for path in used):
            typer.echo(f"in use   {row}")
            continue
        if not is_dry_run:
            scratch.remove(one.path)
        if not is_dry_run and os.path.lexists(one.path):
            refused.append(one.path)
            continue
        total += count
        typer.echo(f"{'remove' if is_dry_run else 'removed':<8} {row}")
    typer.echo(f"{size(total)} {'would be ' if is_dry_run else ''}freed")
    if refused:
        raise AccessError.of(
            "some files could not be removed",
            where=", ".join(map(str, refused)),
            why=f"they belong to another user, or their folder is read-only for user {os.getuid()}",
            remedy=f"sudo rm -r {' '.join(map(str, refused))}",
        )


def removable(settings: Settings) -> Iterator[Removable]:
    """Return everything that can be removed: only what this program made, by its names."""
    models = _unique(load.cache_of(settings.config.model), default_cache(), CONTAINER_CACHE)
    rows = _unique(
        load.dataset_cache_of(settings.config.data), *(cache / "datasets" for cache in models)
    )
    for path in (path for cache in models for path in _listed(cache)):
        if path.name.startswith(f"{embedded.PREPARED}-") and path.is_dir():
            yield Removable(path, "prepared base model")
    for path in (path for cache in rows for path in _listed(cache)):
        if ENTRY.fullmatch(path.name) and path.is_dir():
            yield Removable(path, "tokenized rows")
    for path in (path for cache in rows for path in _listed(cache / "tokenizers")):
        if TOKENIZER.fullmatch(path.name):
            yield Removable(path, "tokenizer")
    for cache in (*models, *rows):
        if (hashes := cache / MEMORY_NAME).is_file():
            yield Removable(hashes, "hashes of files")
        for pattern in (f"{embedded.MAKING}*", "*.tmp-*"):
            for left in scratch.abandoned(cache, pattern, is_own=True):
                yield Removable(left, "unfinished entry")
    for copy in _listed(copies.downloads()):
        yield Removable(copy, "copy of an object store's files")
    for left in scratch.abandoned_temporary():
        yield Removable(left, "temporary folder of a process that ended")


def _unique(*folders: Path) -> list[Path]:
    return list(dict.fromkeys(folder.expanduser().absolute() for folder in folders))


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _mapped_files() -> set[Path]:
    """Return the files that processes of this machine have mapped; a run maps its rows."""
    files: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = process.read_text(errors="replace")
        except OSError:  # another user's, or it has ended
            continue
        files.update(map(Path, MAPPED.findall(text)))
    return files
