"""Content hashes: of files, remembered between runs, and of single examples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from ..host.scratch import remove_abandoned
from .examples import Chat, Completion, Example

MEMORY_NAME = "file-hashes.json"
MAX_REMEMBERED = 10_000
READ_BYTES = 1 << 20
# A file written within this time may change again with the same time stamp.
SETTLED_SECONDS = 2.0


def stamp_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Return a file's size, mtime, ctime and inode, which change when it is written.

    `touch -r` and `rsync --inplace --times` restore the mtime; no program can set the ctime.
    """
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class FileHashes:
    """The sha256 of files; unchanged files (see `stamp_of`) are not read again."""

    def __init__(self, cache_dir: Path) -> None:
        self._memory_path = cache_dir / MEMORY_NAME
        self._known = self._recall()
        self._is_changed = False

    def sha256(self, path: Path) -> str:
        """Return the sha256 of a file's bytes."""
        stat = path.stat()
        name = str(path.resolve())
        identity = list(stamp_of(stat))
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == identity and isinstance(known[-1], str):
            return known[-1]
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(READ_BYTES):
                digest.update(block)
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            self._known[name] = [*identity, digest.hexdigest()]
            self._is_changed = True
        return digest.hexdigest()

    def save(self) -> None:
        """Save the hashes; losing them only costs time, so errors are ignored."""
        if not self._is_changed:
            return
        newest = dict(list(self._known.items())[-MAX_REMEMBERED:])
        with contextlib.suppress(OSError):
            self._memory_path.parent.mkdir(parents=True, exist_ok=True)
            parent, prefix = self._memory_path.parent, f"{MEMORY_NAME}.tmp-"
            remove_abandoned(parent, f"{prefix}*", is_own=True)
            # Not mkstemp, whose file other users could not read.
            beside = parent / f"{prefix}{os.getpid()}-{threading.get_ident()}"
            beside.write_text(json.dumps(newest), encoding="utf-8")
            beside.replace(self._memory_path)
            self._is_changed = False

    def _recall(self) -> dict[str, Any]:
        try:
            known = json.loads(self._memory_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return known if isinstance(known, dict) else {}


def example_hash(example: Example) -> int:
    """Return a 64-bit hash that is equal for examples with the same content.

    Case, white space and the row format are ignored.
    """
    if isinstance(example, Chat):
        fields: Any = ["chat", *map(_turn, example.messages), list(example.tools)]
    elif isinstance(example, Completion):
        fields = ["completion", _plain(example.prompt), _plain(example.completion)]
    else:
        fields = ["text", _plain(example.text)]
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _turn(message: dict[str, Any]) -> list[Any]:
    rest = {str(k): v for k, v in message.items() if k not in ("role", "content", "id")}
    content = message.get("content")
    return [message.get("role"), _plain(content) if isinstance(content, str) else content, rest]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
