"""One tiny model and one run that nothing disturbed, for all fault tests to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.trainer import Trainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def undisturbed(trainer: Trainer) -> Path:
    """Return the output folder of a run that ended by itself."""
    output = trainer.root / "undisturbed"
    ended = trainer.train(output)
    assert ended.code == 0, ended.err
    return output
