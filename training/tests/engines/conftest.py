"""Engines that are really there: started for these tests, or the tests say what is missing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import slurm as slurm_cluster
from support.trainer import Trainer

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora-trainer"


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a place with the tiny model."""
    return Trainer(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def undisturbed(trainer: Trainer) -> Path:
    """Return the output folder of a run that ended by itself."""
    return trainer.finish(trainer.root / "undisturbed")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Slurm]:
    """Start a Slurm of two nodes."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def python_with() -> Callable[[str], Path]:
    """Return the Python of an environment that has packages of requirements.txt beside ours."""

    def made(first: str) -> Path:
        lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
        packages = next(line for line in lines if line.startswith(first)).split()
        key = hashlib.sha256(" ".join([sys.prefix, *packages]).encode()).hexdigest()[:12]
        folder = CACHE / f"engine-{key}"
        python = folder / "bin" / "python"
        if not (folder / "ready").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            ours = folder / "lib" / version / "site-packages" / "trainer.pth"
            ours.write_text(sysconfig.get_path("purelib") + "\n")
            (folder / "ready").touch()
        return python

    return made
