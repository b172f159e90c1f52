"""One tiny model and one run that nothing disturbed, for all fault tests to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.trainer import Trainer
from support.zygote import ForkingTrainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Start runs without the seconds that a worker's imports take."""
    trainer = ForkingTrainer(tmp_path_factory.mktemp("faults"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Start runs by the real command."""
    return Trainer(tmp_path_factory.mktemp("command-line"))


@pytest.fixture(scope="session")
def undisturbed(trainer: Trainer) -> Path:
    """Return the output folder of a run that ended by itself."""
    return trainer.finish(trainer.root / "undisturbed")
