"""Whether a contestant trained the same as the reference: rows, losses, gradients, adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from .job import Job, Record

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-3
LEAST_COSINE = 0.99
WEIGHTS = "adapter_model.safetensors"


def same_training(name: str, job: Job, record: Record, reference: Record) -> None:
    """Assert that a contestant did what the reference did.

    Every row once; at every step the same loss and gradient norm, which is not zero; every adapter
    tensor changed, and the whole change in the reference's direction. (Not to the last digit: the
    first steps of AdamW depend on the sign of gradients that are nearly zero.)
    """
    rows = sorted(row for step in record.step_rows for row in step)
    assert rows == list(range(len(job.examples()))), f"{name} did not train every row once"
    assert len(record.losses) == len(record.step_rows) == len(record.ends), name
    for kind, mine, theirs, tolerance in (
        ("loss", record.losses, reference.losses, LOSS_TOLERANCE),
        ("gradient norm", record.gradient_norms, reference.gradient_norms, GRADIENT_TOLERANCE),
    ):
        pairs = list(zip(mine, theirs, strict=True))
        assert all(theirs > 0 for theirs in (*mine, *theirs)), f"{name}: {kind} of 0: {pairs}"
        off = max(abs(a - b) / b for a, b in pairs)
        assert off <= tolerance, f"{name}: {kind} differs by {off:.1e}: {pairs}"
    cosine = cosine_of_changes(job.adapter, Path(record.adapter), Path(reference.adapter))
    assert cosine >= LEAST_COSINE, f"{name}: the adapter went elsewhere, cosine {cosine:.4f}"


def cosine_of_changes(start: Path, mine: Path, theirs: Path) -> float:
    """Return the cosine between two changes of an adapter.

    Raises:
        AssertionError: a tensor did not change.
    """
    first, one, other = (load_file(folder / WEIGHTS) for folder in (start, mine, theirs))
    assert first.keys() == one.keys() == other.keys(), sorted(first.keys() ^ one.keys())[:4]
    for name, before in first.items():
        assert not np.array_equal(before, one[name]), f"{mine}: {name} did not change"
    changes = [
        np.concatenate([(after[name] - first[name]).ravel() for name in first])
        for after in (one, other)
    ]
    norms = np.linalg.norm(changes[0]) * np.linalg.norm(changes[1])
    return float(changes[0] @ changes[1] / norms)
