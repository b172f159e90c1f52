"""The adapter as initialised (PiSSA): sealed, named by each checkpoint, and verified when used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_trainer.config.settings import resolve
from lora_trainer.errors import StorageError, UnavailableError
from lora_trainer.model.adapter import adapter_state
from lora_trainer.run.events import Event, Warned
from lora_trainer.run_folder import RunFolder
from lora_trainer.train import export, initial
from lora_trainer.train.checkpoint import Snapshot, TrainState, take_snapshot
from lora_trainer.train.session import open_session
from lora_trainer.train.setup import TrainingSetup
from support.tiny_model import write_model, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("initial")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 0, 8)
    return root


def opened(root: Path, output: Path) -> TrainingSetup:
    settings = resolve(
        None,
        {},
        [
            f"--model_name_or_path={root / 'model'}",
            f"--dataset={root / 'rows.jsonl'}",
            f"--dataset_cache_dir={root / 'cache'}",
            "--preprocessing_num_workers=1",
            "--init_lora_weights=pissa",
            "--lora_r=4",
        ],
    )
    return open_session(settings.config, output, lambda _: None)


@pytest.fixture
def started(root: Path, tmp_path: Path) -> tuple[TrainingSetup, Snapshot]:
    """Return a session that saved a checkpoint at its first step, and that checkpoint."""
    session = opened(root, tmp_path)
    session.restore(None)
    taken = take_snapshot(
        TrainState(step=1),
        {name: value + 0.25 for name, value in adapter_state(session.causal.model).items()},
        session.optimizer,
        session.parameters,
        session.store.digest,
    )
    session.store.save(taken)
    snapshot, _ = session.store.newest(session.refuse)
    assert snapshot is not None
    return session, snapshot


def flip_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)


def flip_config(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))


def remove_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


DAMAGES = [flip_weights, flip_config, remove_weights, remove_config, remove_all]


def exported(session: TrainingSetup, target: Path) -> bytes:
    assert session.initial is not None
    folder = initial.verified(session.initial.folder, session.store.initial)
    export.save_adapter(session.causal.model, target, folder)
    return (target / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_first_adapter_is_written_again_and_the_export_is_the_same(
    root: Path,
    tmp_path: Path,
    started: tuple[TrainingSetup, Snapshot],
    damage: Callable[[Path], None],
) -> None:
    session, snapshot = started
    session.restore(snapshot)
    expected = exported(session, tmp_path / "undisturbed")
    damage(RunFolder(tmp_path).initial_adapter)
    again, events = opened(root, tmp_path), list[Event]()
    again.restore(snapshot, events.append)
    assert exported(again, tmp_path / "resumed") == expected
    (warned,) = events
    assert isinstance(warned, Warned)
    assert "rewritten" in warned.message


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_first_adapter_that_is_damaged_by_the_end_is_not_exported_from(
    tmp_path: Path, started: tuple[TrainingSetup, Snapshot], damage: Callable[[Path], None]
) -> None:
    session, _ = started
    damage(RunFolder(tmp_path).initial_adapter)
    with pytest.raises(StorageError, match="initial_adapter is damaged") as caught:
        exported(session, tmp_path / "out")
    assert "run the same command again" in caught.value.problems[0].remedy


def test_first_adapter_of_another_run_is_replaced(
    root: Path, tmp_path: Path, started: tuple[TrainingSetup, Snapshot]
) -> None:
    session, snapshot = started
    other = {name: value * 2 for name, value in adapter_state(session.causal.model).items()}
    initial.save(
        session.causal.model, RunFolder(tmp_path).initial_adapter, initial.weights_digest(other)
    )
    with pytest.raises(StorageError, match="initial_adapter is damaged"):
        initial.verified(RunFolder(tmp_path).initial_adapter, snapshot.initial)
    opened(root, tmp_path).restore(snapshot)
    assert initial.verify(RunFolder(tmp_path).initial_adapter) == snapshot.initial


def test_init_that_comes_out_differently_uses_the_first_one_or_ends(
    tmp_path: Path, started: tuple[TrainingSetup, Snapshot]
) -> None:
    session, snapshot = started
    assert session.initial is not None
    elsewhere = replace(session.initial, digest="of another machine")
    reason = elsewhere.settle(session.causal.model, snapshot.initial)
    assert "first start is used" in reason
    assert initial.verify(tmp_path / RunFolder.initial_adapter) == snapshot.initial
    flip_weights(tmp_path / RunFolder.initial_adapter)
    with pytest.raises(UnavailableError, match="is missing"):
        elsewhere.settle(session.causal.model, snapshot.initial)
