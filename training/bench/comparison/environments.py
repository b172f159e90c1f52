"""The peers' own environment, made from PyPI under the cache folder once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

# The versions that the project's stack `current` has, and TRL's newest for them.
PEERS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "trl==1.16.0",
)


def cache_folder() -> Path:
    """Return the folder of everything that is downloaded or prepared."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lora-trainer" / "bench"


def peers_python(cache: Path) -> Path:
    """Return the Python of the peers' environment; make it on first use (2 minutes, 1.4 GB)."""
    key = hashlib.sha256(" ".join((sys.version, *PEERS)).encode()).hexdigest()[:12]
    folder = cache / f"peers-{key}"
    python, done = folder / "bin/python", folder / "installed"
    if not done.exists():
        print(f"installing {', '.join(PEERS)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PEERS], check=True)
        done.touch()
    return python
