"""Figures that the recording lacks travel in the checkpoint and are repeated on resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_trainer.run.events import Evaluated, Event, Generated, Resumed, RunStarted, StepDone
from lora_trainer.run.history import WHOLE, History
from lora_trainer.run.status import RunStatus, fold
from lora_trainer.run.unrecorded import Unrecorded, recall
from lora_trainer.train.checkpoint_store import CheckpointStore
from support.snapshots import DIGEST, snapshot_at


def step(number: int) -> StepDone:
    return StepDone(
        step=number, epoch=0.1, loss=10.0 - number, learning_rate=0.1, grad_norm=1.0,
        step_seconds=0.5, tokens=4, trained_tokens=2, tokens_seen=4 * number, memory_bytes=1,
    )  # fmt: skip


def evaluated(number: int) -> Evaluated:
    return Evaluated(
        step=number, eval_loss=5.0 - number, eval_perplexity=2.0, eval_token_accuracy=0.5,
        eval_tokens=9, eval_seconds=0.1,
    )  # fmt: skip


def steps(first: int, last: int) -> list[Event]:
    return [step(number) for number in range(first, last + 1)]


STARTED = RunStarted(run_name="r", config_digest="d", output_dir="o")


def record(path: Path, events: list[Event]) -> None:
    with path.open("a") as file:
        file.writelines(event.to_line() for event in events)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    path.touch()
    return path


def test_checkpoint_carries_what_the_disk_does_not_have(recording: Path) -> None:
    record(recording, steps(1, 3))  # of an earlier process
    unrecorded = Unrecorded(recording)
    sent: list[Event] = []
    emit = unrecorded.beside(sent.append)
    before = Generated(step=0, when="before", exact_match=0.25, rows=4, seconds=1.0)
    for event in [before, *steps(2, 6), evaluated(6)]:
        emit(event)
    assert len(sent) == 7
    record(recording, [before, *steps(2, 4)])
    with recording.open("a") as file:
        file.write(step(5).to_line()[:30])  # half a line is not recorded
    assert [json.loads(line)["step"] for line in unrecorded.up_to_now()()] == [5, 6, 6]
    recording.write_text("")  # whoever empties it gets everything that is left again
    record(recording, [step(5)])
    assert [json.loads(line)["event"] for line in unrecorded.up_to_now()()] == ["step", "eval"]


def test_figures_survive_the_way_through_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, digest=DIGEST)
    lines = [event.to_line() for event in steps(1, 2)]
    store.save(replace(snapshot_at(2), figures=lines))
    read, _ = store.newest()
    assert read is not None
    assert list(read.figures) == lines


RECORDED = {
    "nothing": [],
    "the beginning": steps(1, 4),
    "the beginning and, rewound, the rest": [*steps(1, 9), Resumed(step=3, path="p")],
    "a hole": [*steps(1, 4), *steps(7, 8)],
    "steps that were lost when the run began again": [*steps(1, 9), *steps(1, 2)],
    "evaluations alone": [evaluated(0), evaluated(4)],
    "all": [evaluated(0), *steps(1, 4), evaluated(4), *steps(5, 8), evaluated(8)],
    "another run's": [*steps(1, 8), RunStarted(run_name="r", config_digest="e", output_dir="o")],
}


@pytest.mark.parametrize("name", RECORDED)
def test_recording_is_whole_after_the_repeated_figures(recording: Path, name: str) -> None:
    whole = [evaluated(0), *steps(1, 4), evaluated(4), *steps(5, 8), evaluated(8)]
    record(recording, [STARTED, *RECORDED[name]])
    figures, missing = recall(recording, [event.to_line() for event in whole], 8)
    assert [(one.kind, one.step) for one in figures] == [(one.kind, one.step) for one in whole]
    if name == "all":
        assert missing == []
    history, status = History(WHOLE), RunStatus()
    for event in [STARTED, *RECORDED[name], *missing, Resumed(step=8, path="p"), *steps(9, 12)]:
        history.add(event)
        status = fold(status, event)
    assert [point.step for point in history.points(WHOLE)] == list(range(1, 13))
    assert [point.loss for point in history.points(WHOLE)] == [10.0 - n for n in range(1, 13)]
    assert [one.step for one in history.evals()] == [0, 4, 8]
    assert status.step == 12
    assert status.steps_in_attempt == 4


def test_figures_after_the_checkpoint_are_left_to_the_run(recording: Path) -> None:
    record(recording, steps(1, 9))
    figures, missing = recall(recording, [event.to_line() for event in steps(3, 5)], 5)
    assert [one.step for one in figures] == [1, 2, 3, 4, 5]
    assert missing == []
