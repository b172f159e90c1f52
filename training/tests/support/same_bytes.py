"""Two runs that ended with the same losses and bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.trainer import adapter_digest, losses


def assert_same_as(undisturbed: Path, output: Path) -> None:
    assert losses(output) == losses(undisturbed)
    assert adapter_digest(output) == adapter_digest(undisturbed)


def assert_losses_near(undisturbed: Path, output: Path) -> None:
    """Assert that every step, also one done twice, has the loss of the run of one process."""
    own, expected = losses(output), losses(undisturbed)
    assert own.keys() == expected.keys()
    for step, values in own.items():
        for value in values:
            assert value == pytest.approx(min(expected[step]), abs=1e-4)
