"""A finished run that is made longer ends as one that was as long from the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.errors import ConfigError
from lora_trainer.run.events import CheckpointSaved, Evaluated, PhaseChanged, Resumed, StepDone
from lora_trainer.run_folder import RunFolder
from lora_trainer.supervise import earlier_run
from support.continued import Runs

# A run is made longer the same way on every stack; what each resumes to is in test_resume.py.
pytestmark = pytest.mark.any_stack


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a place where `long` had 8 steps from the start, and `short` has 4."""
    folders = Runs(tmp_path_factory.mktemp("runs"))
    folders.start("long", "max_steps", "8")
    folders.start("short")
    return folders


def is_step(number: int) -> object:
    return lambda event: isinstance(event, StepDone) and event.step == number


def test_longer_run_ends_with_the_bytes_of_one_trained_to_that_end_at_once(runs: Runs) -> None:
    assert runs.adapter("short") != runs.adapter("long")
    events = runs.start("short", "max_steps", "8")
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    assert resumed.step == 4
    assert runs.adapter("short") == runs.adapter("long")
    before, after = runs.checkpoint_state("long", 8), runs.checkpoint_state("short", 8)
    for kept in ("best_step", "best_eval_loss", "evaluations_without_better", "tokens_seen"):
        assert after["state"][kept] == before["state"][kept]


def test_epochs_are_continued_past_the_end_of_one(runs: Runs) -> None:
    by_epochs = ("max_steps", None, "num_train_epochs")
    runs.start("epochs-at-once", *by_epochs, "1.25")
    runs.start("epochs", *by_epochs, "0.75")
    runs.start("epochs", *by_epochs, "1.25")
    assert runs.checkpoint_state("epochs", 15)["state"]["step"] == 15
    assert runs.adapter("epochs") == runs.adapter("epochs-at-once")


def test_run_killed_while_it_is_made_longer_ends_with_the_same_bytes(runs: Runs) -> None:
    runs.start("killed")
    folder = runs.root / "killed"
    for die_at in (
        lambda event: isinstance(event, PhaseChanged) and event.phase == "loading",
        lambda event: isinstance(event, Resumed),
        is_step(7),
        lambda event: isinstance(event, PhaseChanged) and event.phase == "exporting",
    ):
        events = runs.start("killed", "max_steps", "8", die_at=die_at)  # type: ignore[arg-type]
        # Until the worker has compared everything, the shorter run is the folder's run.
        has_begun = any(isinstance(event, Resumed) for event in events)
        assert RunFolder(folder).done.exists() is not has_begun
        assert (folder / "final_model" / "adapter_model.safetensors").exists()
    runs.start("killed", "max_steps", "8")
    assert runs.adapter("killed") == runs.adapter("long")


def test_run_killed_while_it_is_made_longer_can_go_back_to_its_old_end(runs: Runs) -> None:
    runs.start("back")
    shorter = runs.adapter("back")
    runs.start("back", "max_steps", "8", die_at=is_step(5))  # type: ignore[arg-type]
    runs.start("back")
    assert runs.adapter("back") == shorter
    assert earlier_run.judge(runs.root / "back", runs.settings("back")).does == "nothing"


def test_last_evaluation_is_not_in_the_checkpoint_where_a_longer_run_has_none(runs: Runs) -> None:
    events = runs.start("order")
    saved = [n for n, e in enumerate(events) if isinstance(e, CheckpointSaved) and e.step == 4]
    scored = [n for n, e in enumerate(events) if isinstance(e, Evaluated) and e.step == 4]
    assert saved < scored
    assert runs.checkpoint_state("order", 4)["state"]["evaluated_step"] == 3


def test_base_weights_changed_in_place_are_refused(runs: Runs) -> None:
    runs.start("changed", die_at=is_step(3))  # type: ignore[arg-type]
    weights = runs.model / "model.safetensors"
    content = weights.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    weights.write_bytes(flipped)
    try:
        with pytest.raises(ConfigError, match="the base model's weights"):
            runs.start("changed")
        with pytest.raises(ConfigError) as finished:
            runs.start("long", "max_steps", "8")
    finally:
        weights.write_bytes(content)
    assert "weights in the model_name_or_path folder" in finished.value.problems[0].why
    runs.start("changed")
    runs.start("undisturbed")
    assert runs.adapter("changed") == runs.adapter("undisturbed")


def test_the_same_base_weights_under_another_path_resume(runs: Runs) -> None:
    runs.start("moved", die_at=is_step(3))  # type: ignore[arg-type]
    elsewhere = runs.root / "elsewhere"
    runs.model.rename(elsewhere)
    try:
        events = runs.start("moved", "model_name_or_path", str(elsewhere))
    finally:
        elsewhere.rename(runs.model)
    assert any(isinstance(event, Resumed) for event in events)
    runs.start("unmoved")
    assert runs.adapter("moved") == runs.adapter("unmoved")


def test_other_rows_are_refused_by_what_differs(runs: Runs, tmp_path: Path) -> None:
    runs.start("rows", die_at=is_step(3))  # type: ignore[arg-type]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(runs.rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="the tokenized rows"):
        runs.start("rows", "dataset", str(fewer))
