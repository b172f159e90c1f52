"""Two runs that ended with the same losses and bytes."""

from __future__ import annotations

from pathlib import Path

from support.trainer import (
    adapter_digest,
    losses,
)


def assert_same_as(undisturbed: Path, output: Path) -> None:
    assert losses(output) == losses(undisturbed)
    assert adapter_digest(output) == adapter_digest(undisturbed)
