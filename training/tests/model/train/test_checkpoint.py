"""Checkpoints: whole or absent, verified when read, and never fewer than promised."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_trainer.checkpoint_folder import FILES, MANIFEST, CorruptCheckpointError, verify
from lora_trainer.train import checkpoint_store
from lora_trainer.train.checkpoint import (
    Snapshot,
    TrainState,
    restore_generators,
    restore_optimizer,
    take_snapshot,
)
from lora_trainer.train.checkpoint_store import CheckpointStore, OtherRunError
from support.snapshots import DIGEST, snapshot_at, steps_of


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, digest=DIGEST)


def test_checkpoint_is_read_as_it_was_written(store: CheckpointStore) -> None:
    written = snapshot_at(3)
    store.save(written)
    read, skipped = store.newest()
    assert read is not None
    assert (read.state, read.digest, skipped) == (written.state, DIGEST, [])
    assert read.generators == written.generators
    for name in ("adapter", "optimizer", "rng"):
        one, other = getattr(read, name), getattr(written, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_snapshot_does_not_change_with_the_parameters() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    snapshot = take_snapshot(TrainState(), {}, optimizer, {"w": weight}, DIGEST)
    before = {name: value.clone() for name, value in snapshot.optimizer.items()}
    optimizer.step()
    assert before.keys() == {"w.step", "w.exp_avg", "w.exp_avg_sq"}
    assert all(torch.equal(snapshot.optimizer[name], before[name]) for name in before)


def test_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (weight**3).sum().backward()
        optimizer.step()

    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    step(weight, optimizer)
    snapshot = take_snapshot(TrainState(), {}, optimizer, {"w": weight}, DIGEST)
    other = torch.nn.Parameter(weight.detach().clone())
    resumed = torch.optim.AdamW([other], lr=0.1)
    restore_optimizer(snapshot, resumed, {"w": other})
    for _ in range(3):
        step(weight, optimizer)
        step(other, resumed)
    assert torch.equal(weight, other)


def test_random_numbers_go_on_as_if_the_run_had_not_stopped() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    np.random.standard_normal()  # leaves half a pair behind, which is state too
    snapshot = snapshot_at(1)
    expected = [draw(), np.random.standard_normal()]
    restore_generators(snapshot)
    assert [draw(), np.random.standard_normal()] == expected


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [flip, cut, empty, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damaged_checkpoint_is_skipped_for_the_one_before(
    store: CheckpointStore, name: str, damage: Callable[[Path], None]
) -> None:
    store.save(snapshot_at(1))
    damage(store.save(snapshot_at(2)) / name)
    read, skipped = store.newest()
    assert read is not None
    assert read.state.step == 1
    assert [reason.split(":")[0] for reason in skipped] == ["step-000002"]


def test_flipped_bit_in_any_byte_of_a_manifest_is_found_or_harmless(store: CheckpointStore) -> None:
    manifest = store.save(snapshot_at(1)) / MANIFEST
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        manifest.write_bytes(content)
        try:
            verify(manifest.parent)
        except CorruptCheckpointError:
            continue
        # One kind of white space for another says the same.
        assert json.loads(content) == json.loads(whole)


def test_manifest_that_names_no_files_does_not_verify(store: CheckpointStore) -> None:
    path = store.save(snapshot_at(1))
    (path / MANIFEST).write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="does not list the files"):
        verify(path)


def test_nothing_is_resumed_where_every_checkpoint_is_damaged(store: CheckpointStore) -> None:
    for step in (1, 2):
        flip(store.save(snapshot_at(step)) / "adapter.safetensors")
    read, skipped = store.newest()
    assert read is None
    assert len(skipped) == 2


def test_checkpoint_of_another_run_is_refused(store: CheckpointStore) -> None:
    store.save(snapshot_at(1))
    other = CheckpointStore(store.folder, keep=2, digest="another run")
    with pytest.raises(OtherRunError, match="step-000001"):
        other.newest()


def test_newest_ones_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step in range(1, 7):
        store.save(snapshot_at(step, best_step=2 if step >= 2 else None))
    assert steps_of(store) == [2, 5, 6]


def test_damaged_later_checkpoint_does_not_push_out_the_new_one(store: CheckpointStore) -> None:
    for step in (30, 40):
        store.save(snapshot_at(step))
    for step in (30, 40):
        flip(store.path_of(step) / "adapter.safetensors")
    store.save(snapshot_at(25))
    read, skipped = store.newest()
    assert read is not None
    assert (read.state.step, skipped) == (25, [])
    assert steps_of(store) == [25]


def test_steps_are_ordered_as_numbers(store: CheckpointStore) -> None:
    for step in (999_999, 1_000_000):
        store.save(snapshot_at(step))
    read, _ = store.newest()
    assert read is not None
    assert read.state.step == 1_000_000


def test_nothing_old_is_removed_when_the_new_one_does_not_verify(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        store.save(snapshot_at(step))

    def refuse(path: Path) -> None:
        raise CorruptCheckpointError(path.name)

    monkeypatch.setattr(checkpoint_store, "verify", refuse)
    with pytest.raises(CorruptCheckpointError):
        store.save(snapshot_at(3))
    assert steps_of(store) == [1, 2, 3]


def test_full_disk_leaves_the_older_checkpoints_and_no_half_one(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(snapshot_at(1))

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        store.save(snapshot_at(2))
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]


def test_what_a_kill_left_half_written_is_removed(store: CheckpointStore) -> None:
    left = store.folder / ".writing-step-000007"
    left.mkdir(parents=True)
    (left / "adapter.safetensors").write_bytes(b"half")
    store.save(snapshot_at(8))
    assert not left.exists()


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test may do anything after it."""


def kill_at_call(
    number: int, store: CheckpointStore, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Save, dead from the n-th call that touches the disk; return whether it got so far."""
    left = number

    def mortal(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return call(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, names in (
            (os, ["fsync"]),
            (Path, ["mkdir", "open", "replace", "unlink", "rmdir"]),
        ):
            for name in names:
                patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            store.save(snapshot)
        except Killed:
            return True
    return False


def test_kill_at_any_call_leaves_a_sound_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        store.save(snapshot_at(step))
    snapshot = snapshot_at(3)
    backup = store.folder.with_name("backup")
    shutil.copytree(store.folder, backup)
    steps = []
    for number in range(1, 100):
        if not kill_at_call(number, store, snapshot, monkeypatch):
            break
        read, _ = store.newest()
        assert read is not None
        steps.append(read.state.step)
        shutil.rmtree(store.folder)
        shutil.copytree(backup, store.folder)
    assert len(steps) > 10
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


def test_thousand_flipped_bits_are_found_or_harmless(store: CheckpointStore) -> None:
    """Real files, one bit each, anywhere in any file of the newest checkpoint."""
    store.save(snapshot_at(1))
    path = store.save(snapshot_at(2))
    draw = random.Random(9)
    whole = {name: (path / name).read_bytes() for name in (*FILES, MANIFEST)}
    harmless = 0
    for _ in range(1000):
        name = draw.choice([*whole])
        content = bytearray(whole[name])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(content)
        read, skipped = store.newest()
        assert read is not None
        if read.state.step == 2:
            # One kind of white space for another in the manifest says the same.
            assert name == MANIFEST
            assert json.loads(content) == json.loads(whole[name])
            harmless += 1
        else:
            assert [reason.split(":")[0] for reason in skipped] == ["step-000002"]
        (path / name).write_bytes(whole[name])
    assert harmless < 30


def test_evaluation_before_the_first_step_is_never_the_best() -> None:
    state = TrainState().after_evaluation(0.1, 0.0)
    assert (state.best_step, state.evaluated_step) == (None, 0)


def test_the_best_is_the_lowest_and_the_threshold_is_patience_alone() -> None:
    state = TrainState(step=5).after_evaluation(2.0, 0.5)
    state = replace(state, step=10).after_evaluation(1.6, 0.5)
    assert (state.best_step, state.evaluations_without_better) == (10, 1)
    state = replace(state, step=15).after_evaluation(1.0, 0.5)
    assert (state.best_step, state.evaluations_without_better) == (15, 0)
    state = replace(state, step=20).after_evaluation(1.2, 0.5)
    assert (state.best_step, state.evaluations_without_better) == (15, 1)
