"""What a start makes of the run that its output folder holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_trainer.batch import NOT_BEGUN, RunBatch
from lora_trainer.commands import check
from lora_trainer.config.settings import Settings, resolve
from lora_trainer.errors import ConfigError
from lora_trainer.host.disk import write_json
from lora_trainer.plan import steps_of
from lora_trainer.run_folder import RunFolder
from lora_trainer.supervise import earlier_run
from lora_trainer.supervise.earlier_run import judge, mark_of
from lora_trainer.train.identity import Identity, Mark, read_mark
from lora_trainer.train.recorded_run import begun_batch

FOREVER = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]


class Folder:
    """An output folder, and the settings of starts in it."""

    def __init__(self, path: Path, data: Path) -> None:
        self.path, self.data = path, data

    def settings(self, *arguments: str) -> Settings:
        own = ["--output_dir", str(self.path)]
        own += [] if "--dataset" in arguments else ["--dataset", str(self.data)]
        return resolve(None, {}, [*own, *arguments])

    def leave(self, *arguments: str, steps: int = 10, is_finished: bool = True) -> None:
        """Leave what a run of ten steps leaves after `steps`."""
        config = self.settings(*arguments).config
        (self.path / "checkpoints" / f"step-{steps:06d}").mkdir(parents=True)
        write_json(RunFolder(self.path).resolved, self.settings(*arguments).redacted())
        total, warmup = steps_of(config.training, 10)
        plan = {"total_steps": total, "warmup_steps": warmup, "steps_per_epoch": 10}
        write_json(self.path / "plan.json", plan)
        identity = Identity(config.digest(), "0", "b" * 16, "d" * 16, "0", "12")
        state = {"digest": str(identity), "state": {"step": steps}}
        write_json(self.path / "checkpoints" / f"step-{steps:06d}" / "state.json", state)
        mark_of(config).write(self.path)
        if is_finished:
            RunFolder(self.path).done.touch()

    def judged(self, *arguments: str) -> earlier_run.Verdict:
        return judge(self.path, self.settings(*arguments))

    def refused(self, *arguments: str) -> str:
        with pytest.raises(ConfigError) as caught:
            self.judged(*arguments)
        return caught.value.block()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr("lora_trainer.train.identity.base_folder", lambda _: None)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "out").mkdir()
    return Folder(tmp_path / "out", data)


def test_batch_of_a_run_is_read_from_its_checkpoint_then_from_its_plan(folder: Folder) -> None:
    assert begun_batch(folder.path) == NOT_BEGUN
    folder.leave(is_finished=False)
    write_json(folder.path / "plan.json", {"run_batch": "32.4.1024"})
    assert begun_batch(folder.path) == RunBatch(12)
    shutil.rmtree(folder.path / "checkpoints")
    assert begun_batch(folder.path) == RunBatch(32, 4, 1024)
    write_json(folder.path / "plan.json", {"step_examples": 32})
    assert begun_batch(folder.path) == RunBatch(32)
    write_json(folder.path / "plan.json", {"run_batch": -1})
    assert begun_batch(folder.path) == NOT_BEGUN


def test_finished_run_is_reported_with_its_results_and_the_way_to_train_again(
    folder: Folder,
) -> None:
    folder.leave("--max_steps", "10")
    verdict = folder.judged("--max_steps", "10")
    assert verdict.does == "nothing"
    (note,) = verdict.notes
    for part in (str(folder.path / "final_model"), "--run_name", "--on_finished archive"):
        assert part in note


def test_finished_run_with_another_configuration_is_refused_with_both_values(
    folder: Folder,
) -> None:
    folder.leave("--max_steps", "10")
    block = folder.refused("--max_steps", "10", "--learning_rate", "0.001", "--lora_r", "8")
    for part in (
        "learning_rate: 0.0002 -> 0.001",
        "lora_r: 16 -> 8",
        "--run_name",
        "--on_finished archive",
        "exit code 78",
    ):
        assert part in block


def test_finished_run_on_another_dataset_is_refused(folder: Folder, tmp_path: Path) -> None:
    folder.leave("--max_steps", "10")
    other = tmp_path / "other.jsonl"
    other.write_text(folder.data.read_text())
    assert f"dataset: {folder.data} -> {other}" in folder.refused(
        "--max_steps", "10", "--dataset", str(other)
    )


def test_preflight_refuses_before_any_restart_policy(folder: Folder) -> None:
    folder.leave("--max_steps", "10")
    with pytest.raises(ConfigError, match="finished run with another configuration"):
        check.preflight(folder.settings("--max_steps", "10", "--lora_r", "8"))
    check.preflight(folder.settings("--max_steps", "10"))


def test_finished_run_is_moved_aside_where_asked(folder: Folder) -> None:
    folder.leave("--max_steps", "10")
    assert folder.judged("--lora_r", "8", "--on_finished", "archive").does == "move aside"


@pytest.mark.parametrize(
    "longer", [("--max_steps", "20"), ("--num_train_epochs", "2", "--max_steps", "-1")]
)
def test_finished_run_with_a_constant_schedule_is_continued(
    folder: Folder, longer: tuple[str, ...]
) -> None:
    folder.leave(*FOREVER, "--max_steps", "10")
    verdict = folder.judged(*FOREVER, *longer)
    assert verdict.does == "go on"
    assert "continued" in verdict.notes[0]


def test_length_said_in_other_keys_is_the_same_run(folder: Folder) -> None:
    folder.leave("--max_steps", "10", "--warmup_steps", "0")
    same = ("--max_steps", "-1", "--num_train_epochs", "1", "--warmup_ratio", "0")
    assert folder.judged(*same).does == "nothing"


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("schedule", "changed", "why"),
    [
        ("cosine", ("--max_steps", "20"), "learning rates depend on the number of steps"),
        ("linear", ("--max_steps", "20"), "learning rates depend on the number of steps"),
        ("constant", ("--max_steps", "20", "--warmup_ratio", "0.1"), "--warmup_steps 0 keeps it"),
        ("constant", ("--max_steps", "5", "--warmup_steps", "0"), "10 steps are done already"),
    ],
)
def test_length_that_the_schedule_does_not_allow_is_refused_with_the_reason(
    folder: Folder, is_finished: bool, schedule: str, changed: tuple[str, ...], why: str
) -> None:
    kind = ("--lr_scheduler_type", schedule)
    folder.leave(*kind, "--max_steps", "10", "--warmup_steps", "0", is_finished=is_finished)
    keep = () if any("warmup" in word for word in changed) else ("--warmup_steps", "0")
    block = folder.refused(*kind, *changed, *keep)
    assert f"max_steps: 10 -> {changed[1]}" in block
    assert why in block


def test_finished_run_without_a_checkpoint_is_not_continued(folder: Folder) -> None:
    folder.leave(*FOREVER, "--max_steps", "10")
    (folder.path / "checkpoints").rename(folder.path.with_name("elsewhere"))
    assert "it has no checkpoint" in folder.refused(*FOREVER, "--max_steps", "20")


def test_finished_run_is_not_continued_where_resume_is_never(folder: Folder) -> None:
    folder.leave(*FOREVER, "--max_steps", "10")
    longer = (*FOREVER, "--max_steps", "20", "--resume", "never")
    assert "resume is never" in folder.refused(*longer)


@pytest.mark.parametrize(
    "left", [RunFolder.digest, RunFolder.done, RunFolder.resolved, "events.jsonl", "plan.json"]
)
def test_resume_never_moves_aside_whatever_is_left_of_a_run(folder: Folder, left: str) -> None:
    folder.leave("--max_steps", "10", steps=4, is_finished=False)
    for path in (
        RunFolder(folder.path).digest,
        RunFolder(folder.path).resolved,
        folder.path / "plan.json",
    ):
        path.unlink()
    (folder.path / left).touch()
    never = ("--resume", "never", "--on_finished", "archive")
    assert folder.judged("--max_steps", "10", *never).does == "move aside"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"2 0123456789abcdef 0 00000000\n"])
def test_damaged_or_missing_digest_is_reported_and_the_checkpoints_are_used(
    folder: Folder, content: bytes | None
) -> None:
    folder.leave("--max_steps", "10", steps=4, is_finished=False)
    RunFolder(folder.path).digest.unlink()
    if content is not None:
        RunFolder(folder.path).digest.write_bytes(content)
    verdict = folder.judged("--max_steps", "10")
    assert verdict.does == "go on"
    assert RunFolder.digest in verdict.notes[0]
    assert "lora_r: 16 -> 8" in folder.refused("--max_steps", "10", "--lora_r", "8")


def test_damaged_digest_of_a_finished_run_is_reported(folder: Folder) -> None:
    folder.leave("--max_steps", "10")
    RunFolder(folder.path).digest.write_text("damaged")
    verdict = folder.judged("--max_steps", "10")
    assert verdict.does == "nothing"
    assert f"{RunFolder.digest} is damaged" in verdict.notes
    assert "lora_r: 16 -> 8" in folder.refused("--max_steps", "10", "--lora_r", "8")


def test_traces_without_digest_and_checkpoint_are_moved_aside(folder: Folder) -> None:
    (folder.path / "initial_adapter").mkdir()
    verdict = folder.judged()
    assert verdict.does == "move aside"
    assert f"{RunFolder.digest} is missing" in verdict.notes


def test_every_flipped_bit_of_a_digest_is_noticed(tmp_path: Path) -> None:
    Mark("0123456789abcdef", "fedcba9876543210").write(tmp_path)
    sound = RunFolder(tmp_path).digest.read_bytes()
    for bit in range(8 * len(sound)):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        RunFolder(tmp_path).digest.write_bytes(flipped)
        assert read_mark(tmp_path)[0] is None, bytes(flipped)


@pytest.mark.parametrize("is_finished", [True, False])
def test_run_of_an_earlier_version_is_recognized(folder: Folder, is_finished: bool) -> None:
    folder.leave("--max_steps", "10", is_finished=is_finished)
    RunFolder(folder.path).digest.write_text("0123456789abcdef\n")
    state = folder.path / "checkpoints" / "step-000010" / "state.json"
    state.write_text(json.dumps({"digest": "0123456789abcdef-fedcba9876543210"}))
    if is_finished:
        assert folder.judged("--max_steps", "10").does == "nothing"
        assert "lora_r: 16 -> 8" in folder.refused("--max_steps", "10", "--lora_r", "8")
    else:
        block = folder.refused("--max_steps", "10")
        assert "an unfinished run of an earlier version" in block
        assert "--resume never" in block
