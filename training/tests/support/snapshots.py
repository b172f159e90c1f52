"""Checkpoints as small as can be, for the tests of their folders."""

from __future__ import annotations

import torch

from lora_trainer.train.checkpoint import Snapshot, TrainState, take_snapshot
from lora_trainer.train.checkpoint_store import CheckpointStore

DIGEST = "this run"


def snapshot_at(step: int, *, best_step: int | None = None) -> Snapshot:
    weight = torch.nn.Parameter(torch.full((3, 2), float(step)))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    state = TrainState(step=step, best_step=best_step)
    return take_snapshot(
        state, {"a.weight": weight.detach()}, optimizer, {"a.weight": weight}, DIGEST
    )


def steps_of(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in store.folder.glob("step-*"))
