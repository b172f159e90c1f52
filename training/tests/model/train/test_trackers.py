"""Trackers witness a run: they never stop it, and never hear a secret."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lora_trainer.model import stacks
from lora_trainer.train import trackers
from lora_trainer.train.trackers import NullTracker, missing_trackers, open_trackers


class FakeTracker:
    """Stands in for one of Accelerate's trackers."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.steps: list[int] = []
        self.is_finished = False

    def log(self, values, step):
        if step == self.fails_at:
            raise ConnectionError("no route to https://me:hunter22@host/ with key-12345")
        self.steps.append(step)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def start(monkeypatch):
    """Let the names tensorboard and wandb start the given trackers."""

    def put(**inner):
        for name, tracker in inner.items():
            monkeypatch.setitem(trackers._START, name, lambda *_, t=tracker: t)

    return put


def _events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_an_empty_list_gives_a_tracker_that_does_nothing(tmp_path):
    tracker = open_trackers([], tmp_path, "run", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert isinstance(tracker, NullTracker)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_a_problem_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    (problem,) = missing_trackers(["wandb"])
    assert problem.where == "monitoring.report_to"
    assert (
        problem.remedy == f"remove wandb from report_to, or {sys.executable} -m pip install wandb"
    )


def test_an_image_is_offered_no_installation(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(stacks, "LOCKS", Path("/no/requirements"))
    (problem,) = missing_trackers(["wandb"])
    assert problem.remedy == "remove wandb from report_to"


def test_a_folder_of_the_package_s_name_is_not_the_package(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    assert len(missing_trackers(["wandb"])) == 1


def test_an_installed_package_is_no_problem():
    assert missing_trackers(["tensorboard"]) == []


def test_tensorboard_holds_the_figures_of_each_step(tmp_path):
    tracker = open_trackers(
        ["tensorboard"], tmp_path, "run", {"lora_r": 16}, on_warning=pytest.fail
    )
    for step in (1, 2):
        tracker.log({"loss": 1.0 / step}, step)
    tracker.close()
    points = _events(tmp_path / "run").Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5)]


def test_a_resumed_run_hides_what_tensorboard_has_from_its_first_step_on(tmp_path):
    for first, loss in ((0, 1.0), (2, 5.0)):
        tracker = open_trackers(["tensorboard"], tmp_path, "run", {}, first_step=first)
        for step in range(first, 4):
            tracker.log({"loss": loss}, step)
        tracker.close()
    points = _events(tmp_path / "run").Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(0, 1), (1, 1), (2, 5), (3, 5)]


def test_secrets_do_not_reach_the_logs(tmp_path):
    config = {"hf_token": "hf_abcdef", "lora_r": 16, "lora_target_modules": ["q_proj"]}
    open_trackers(["tensorboard"], tmp_path, "run", config).close()
    logged = b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir())
    assert b"lora_target_modules" in logged
    assert b"hf_abcdef" not in logged


def test_a_failing_tracker_warns_once_and_the_others_go_on(start, tmp_path):
    good, bad, warnings = FakeTracker(), FakeTracker(fails_at=1), []
    start(wandb=bad, tensorboard=good)
    tracker = open_trackers(
        ["wandb", "tensorboard"], tmp_path, "run", {}, on_warning=warnings.append
    )
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert (bad.steps, good.steps, good.is_finished) == ([0], [0, 1, 2], True)
    assert len(warnings) == 1
    assert "wandb" in warnings[0]


def test_a_tracker_that_does_not_start_is_left_out(monkeypatch, tmp_path):
    def refuse(*_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(trackers._START, "wandb", refuse)
    warnings: list[str] = []
    tracker = open_trackers(["wandb"], tmp_path, "run", {}, on_warning=warnings.append)
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    assert warnings == ["tracker wandb failed and is disabled: RuntimeError: no API key"]


def test_a_warning_quotes_no_secret(start, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "key-12345")
    start(wandb=FakeTracker(fails_at=0))
    warnings: list[str] = []
    open_trackers(["wandb"], tmp_path, "run", {}, on_warning=warnings.append).log({}, 0)
    assert "ConnectionError" in warnings[0]
    assert "hunter22" not in warnings[0]
    assert "key-12345" not in warnings[0]


def test_standard_output_stays_the_worker_s(start, tmp_path, capsys):
    chatty = FakeTracker()
    chatty.finish = lambda: print("* Run finished")
    start(wandb=chatty)
    open_trackers(["wandb"], tmp_path, "run", {}).close()
    assert capsys.readouterr().out == ""


def test_a_tracker_s_run_id_is_found_again(tmp_path):
    trackers._write_id(tmp_path, "wandb", "one")
    trackers._write_id(tmp_path, "mlflow", "two")
    assert trackers._read_ids(tmp_path) == {"wandb": "one", "mlflow": "two"}
