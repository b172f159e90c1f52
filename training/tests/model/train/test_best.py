"""The best checkpoint is verified when a run resumes and when its adapter is exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_trainer.config.settings import resolve
from lora_trainer.errors import StorageError
from lora_trainer.train.checkpoint import Snapshot, TrainState, take_snapshot
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.session import open_session
from lora_trainer.train.setup import TrainingSetup
from support.snapshots import steps_of
from support.tiny_model import write_model, write_rows


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    root = tmp_path_factory.mktemp("best")
    settings = resolve(
        None,
        {},
        [
            f"--model_name_or_path={write_model(root / 'model')}",
            f"--dataset={write_rows(root / 'rows.jsonl', 0, 8)}",
            f"--eval_dataset={write_rows(root / 'held-out.jsonl', 9, 4)}",
            f"--dataset_cache_dir={root / 'cache'}",
            "--preprocessing_num_workers=1",
            "--eval_steps=1",
            "--load_best_model_at_end=true",
        ],
    )
    return open_session(settings.config, root / "out", lambda _: None)


@pytest.fixture
def session(opened: TrainingSetup, tmp_path: Path) -> TrainingSetup:
    """Return a session after four steps, each with a checkpoint; the second is the best."""
    return trained(opened, tmp_path, keep=2)


def trained(opened: TrainingSetup, folder: Path, *, keep: int) -> TrainingSetup:
    store = CheckpointStore(folder / "checkpoints", keep=keep, digest=opened.store.digest)
    session = replace(opened, store=store)
    for step, best_step in ((1, 1), (2, 2), (3, 2), (4, 2)):
        store.save(snapshot_of(session, TrainState(step=step, best_step=best_step)))
    return session


def snapshot_of(session: TrainingSetup, state: TrainState) -> Snapshot:
    adapter = {
        name: torch.full(p.shape, float(state.step)) for name, p in session.parameters.items()
    }
    return take_snapshot(
        state, adapter, session.optimizer, session.parameters, session.store.digest
    )


def damage(session: TrainingSetup) -> None:
    path = session.store.path_of(2) / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove_best(session: TrainingSetup) -> None:
    shutil.rmtree(session.store.path_of(2))


def put_another_steps(session: TrainingSetup) -> None:
    shutil.rmtree(session.store.path_of(2))
    shutil.copytree(session.store.path_of(3), session.store.path_of(2))


UNSOUND = [damage, remove_best, put_another_steps]


def test_sound_best_is_exported(session: TrainingSetup) -> None:
    newest, skipped = session.store.newest(session.refuse)
    assert newest is not None
    assert (newest.state.step, skipped) == (4, [])
    session.take_best(newest.state)
    assert all(bool((p == 2.0).all()) for p in session.parameters.values())


@pytest.mark.parametrize("make_unsound", UNSOUND, ids=lambda make: make.__name__)
def test_run_goes_back_behind_a_best_that_is_not_sound(
    session: TrainingSetup, make_unsound: Callable[[TrainingSetup], None]
) -> None:
    make_unsound(session)
    newest, skipped = session.store.newest(session.refuse)
    # Step 1 was removed as the oldest: all is trained again, with the same result.
    assert newest is None
    names = [reason.split(":")[0] for reason in skipped]
    assert names[:2] == ["step-000004", "step-000003"]
    assert all("best checkpoint, step-000002, is not sound" in one for one in skipped[:2])


@pytest.mark.parametrize("make_unsound", UNSOUND, ids=lambda make: make.__name__)
def test_run_goes_back_to_an_earlier_sound_checkpoint_if_there_is_one(
    opened: TrainingSetup, tmp_path: Path, make_unsound: Callable[[TrainingSetup], None]
) -> None:
    session = trained(opened, tmp_path, keep=9)
    make_unsound(session)
    newest, _ = session.store.newest(session.refuse)
    assert newest is not None
    assert newest.state.step == 1


@pytest.mark.parametrize("make_unsound", UNSOUND, ids=lambda make: make.__name__)
def test_best_that_is_not_sound_at_the_end_is_never_replaced_by_the_last(
    session: TrainingSetup, make_unsound: Callable[[TrainingSetup], None]
) -> None:
    make_unsound(session)
    with pytest.raises(StorageError, match="the best checkpoint is damaged") as caught:
        session.take_best(TrainState(step=4, best_step=2))
    assert caught.value.exit_code == 74
    assert "run the same command again" in caught.value.problems[0].remedy


def test_best_of_every_kept_checkpoint_is_kept(session: TrainingSetup) -> None:
    session.store.save(snapshot_of(session, TrainState(step=5, best_step=5)))
    assert steps_of(session.store) == [2, 4, 5]
    session.store.save(snapshot_of(session, TrainState(step=6, best_step=5)))
    assert steps_of(session.store) == [5, 6]


def test_checkpoint_of_another_shape_is_skipped(session: TrainingSetup) -> None:
    state = TrainState(step=5, best_step=5)
    odd = snapshot_of(session, state)
    session.store.save(replace(odd, adapter={n: t[:1] for n, t in odd.adapter.items()}))
    newest, skipped = session.store.newest(session.refuse)
    assert newest is not None
    assert newest.state.step == 4
    assert "has the shape" in skipped[0]
