"""Addresses such as s3://bucket/run: recognized, joined, and where their files are kept locally.

Imports nothing of the package and no fsspec: every configuration passes through here.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

FORM = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://(?P<path>[^/].*|/.+)", re.DOTALL)
# `Path` folds two slashes into one.
FOLDED = re.compile(r"([a-z][a-z0-9+.-]+):/(?=[^/])")
# The hub has keys and commands of its own, and a web server cannot be written.
OTHERS = frozenset({"hf", "http", "https"})


def is_address(text: str) -> bool:
    """Return whether a text names a folder or file on an object store."""
    matched = FORM.fullmatch(text)
    return matched is not None and matched["protocol"] not in OTHERS


def protocol_of(address: str) -> str:
    """Return the protocol of an address, such as s3."""
    return address.partition("://")[0]


def unfolded(path: str) -> str:
    """Return an address that was taken for a path as it was given; other text unchanged."""
    return FOLDED.sub(r"\1://", path, count=1) if FOLDED.match(path) else path


def joined(address: str, name: str) -> str:
    """Return the address of an entry below an address."""
    return f"{address.rstrip('/')}/{name}"


def default_cache() -> Path:
    """Return this program's cache folder: beside the hub's cache, as HF_HOME says."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lora-trainer"


def local_name(address: str) -> str:
    """Return the name of the local folder for an address: readable, and unlike any other's."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", address.rstrip("/").rpartition("/")[2])[:60].strip(".-")
    return f"{last or 'run'}-{hashlib.sha256(address.rstrip('/').encode()).hexdigest()[:12]}"
