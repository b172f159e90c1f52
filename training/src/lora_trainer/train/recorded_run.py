"""What an output folder records of its run: checkpoints, identity, batch. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..batch import RunBatch
from ..checkpoint_folder import CorruptCheckpointError, listed, read_state
from ..run_folder import RunFolder
from .identity import Identity


def checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first, verified or not."""
    try:
        return listed(RunFolder(folder).checkpoints)
    except OSError:
        return []


def newest_identity(paths: Sequence[Path]) -> Identity | None:
    """Return the identity in the newest of these checkpoints whose state can be read."""
    for path in reversed(paths):
        try:
            text = read_state(path).get("digest")
        except CorruptCheckpointError:
            continue
        if isinstance(text, str):
            return Identity.parse(text)
    return None


def begun_batch(folder: Path) -> RunBatch:
    """Return the batch of the folder's run.

    A run that has no checkpoint yet is the same run when it starts again: its plan has the batch.
    """
    identity = newest_identity(checkpoints(folder))
    plan = read_json(RunFolder(folder).plan)
    # Versions that cut by examples alone recorded their number.
    planned = plan.get("run_batch", plan.get("step_examples", ""))
    return RunBatch.parse(identity.batch if identity else str(planned))


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one if it has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
