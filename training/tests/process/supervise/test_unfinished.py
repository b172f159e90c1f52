"""What a start makes of the folder it finds: damaged, of another run, or finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.trainer import (
    Trainer,
    adapter_digest,
    at_phase,
    at_step,
    events_of,
    losses,
    of_kind,
    steps_saved,
)

Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def killed(trainer: Trainer) -> Path:
    """Return the folder of a run that was killed behind its third checkpoint."""
    output = trainer.root / "left"
    run = trainer.start(output)
    run.wait_for(at_step(33))
    run.kill()
    return output


@pytest.fixture
def copy_of(trainer: Trainer, killed: Path) -> Copy:
    """Return a function that copies the killed run to a folder of another name."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(killed, trainer.root / name))

    return copy


def test_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(
    trainer: Trainer, undisturbed: Path, copy_of: Copy
) -> None:
    output = copy_of("damaged")
    *_, older, newest = steps_saved(output)
    damaged = output / "checkpoints" / f"step-{newest:06d}" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    half_written = output / "checkpoints" / ".writing-step-000099"
    half_written.mkdir()
    (half_written / "adapter.safetensors").write_bytes(b"half")

    ended = trainer.train(output)

    assert ended.code == 0, ended.err
    (resumed,) = of_kind(output, "resumed")
    assert resumed["step"] == older
    assert [name.split(":")[0] for name in resumed["skipped"]] == [f"step-{newest:06d}"]
    assert any(
        "optimizer.safetensors has changed" in e["message"] for e in of_kind(output, "warning")
    )
    assert not half_written.exists()
    assert losses(output) == losses(undisturbed)
    assert adapter_digest(output) == adapter_digest(undisturbed)


def test_changed_configuration_is_refused_by_the_name_of_its_key(
    trainer: Trainer, copy_of: Copy
) -> None:
    output = copy_of("changed-config")
    before = sorted(path.name for path in output.rglob("*"))
    ended = trainer.train(output, learning_rate=0.02)
    assert ended.code == 78, ended.err
    assert "learning_rate: 0.01 -> 0.02" in ended.block
    assert "--resume never" in ended.block
    assert sorted(path.name for path in output.rglob("*")) == before


def test_changed_data_are_refused(trainer: Trainer, copy_of: Copy) -> None:
    output = copy_of("changed-data")
    saved = steps_saved(output)
    rows = trainer.root / "fewer.jsonl"
    rows.write_text("".join(trainer.rows.read_text().splitlines(keepends=True)[:-1]))
    ended = trainer.train(output, dataset=str(rows))
    assert ended.code == 78, ended.err
    assert "the tokenized rows" in ended.block
    assert steps_saved(output) == saved


def test_resume_never_moves_the_unfinished_run_aside(trainer: Trainer, copy_of: Copy) -> None:
    output = copy_of("started-over")
    events, saved = events_of(output), steps_saved(output)
    run = trainer.start(output, resume="never", learning_rate=0.02)
    run.wait_for(at_step(1))
    run.kill()
    aside = output.with_name("started-over.1")
    assert (events_of(aside), steps_saved(aside)) == (events, saved)
    assert not of_kind(output, "resumed")
    assert str(aside) in of_kind(output, "warning")[0]["message"]


def test_finished_run_is_moved_aside(trainer: Trainer, undisturbed: Path) -> None:
    output = Path(shutil.copytree(undisturbed, trainer.root / "again"))
    run = trainer.start(output, on_finished="archive")
    run.wait_for(at_phase("starting"))
    run.kill()
    aside = output.with_name("again.1")
    assert adapter_digest(aside) == adapter_digest(undisturbed)
    assert (aside / "DONE").exists()
    assert not (output / "final_model").exists()


@pytest.mark.parametrize(
    ("changed", "code", "text"),
    [
        ({}, 0, "this run is already finished"),
        ({"learning_rate": 0.02}, 78, "learning_rate: 0.01 -> 0.02"),
        ({"max_steps": 90}, 78, "max_steps: 60 -> 90"),
    ],
)
def test_finished_run_is_left_as_it_is(
    trainer: Trainer, undisturbed: Path, changed: dict[str, object], code: int, text: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    ended = trainer.train(undisturbed, **changed)
    assert ended.code == code, ended.err
    assert text in " ".join((ended.out + ended.err).split())
    before.pop(undisturbed / ".lock")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_finished_run_is_continued_to_a_later_end(trainer: Trainer) -> None:
    output = trainer.root / "longer"
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 2}
    assert trainer.train(output, **constant, max_steps=4).code == 0
    ended = trainer.train(output, **constant, max_steps=8)
    assert ended.code == 0, ended.err
    assert [event["step"] for event in of_kind(output, "resumed")] == [4]
    assert sorted(losses(output)) == list(range(1, 9))
    assert (output / "DONE").exists()
    assert not (trainer.root / "longer.1").exists()
