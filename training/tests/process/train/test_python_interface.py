"""`from lora_trainer import train, load_config`: the command's run, from Python."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import lora_trainer
from lora_trainer import RunResults, TrainerError, api, load_config, train
from lora_trainer.errors import ConfigError, DataError, StoppedError
from lora_trainer.run.events import Failed, Finished, Stopped
from lora_trainer.run_folder import RunFolder
from support.shell_worker import play, says, step_line
from support.tiny_model import write_model, write_rows

GUIDE = Path(__file__).parents[4] / "docs" / "python.md"
FINISHED = Finished(
    step=1, train_seconds=0.2, tokens_seen=2, peak_memory_bytes=7, results=[]
).to_line()


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Return the values of a run of the tiny model."""
    return {
        "model_name_or_path": write_model(tmp_path / "model"),
        "dataset": write_rows(tmp_path / "train.jsonl", 0, 8),
        "output_dir": tmp_path / "out",
        "health_port": 0,
        "lora_target_modules": ("q_proj", "v_proj"),
        "quiet": True,
    }


def test_finished_run_returns_its_results(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch, says(step_line(1, 2.5), FINISHED))
    results = train(**values)
    assert isinstance(results, RunResults)
    assert (results.status, results.exit_code, results.last_loss) == ("finished", 0, 2.5)
    assert (tmp_path / "out" / RunFolder.results).is_file()
    assert train(**values) == results  # the finished run is left alone
    assert (tmp_path / "count").read_text() == "1\n"


@pytest.mark.parametrize(
    ("kind", "event", "code"),
    [
        (DataError, Failed(exit_code=65, problems=[{"what": "bad row", "remedy": "fix it"}]), 65),
        (StoppedError, Stopped(step=0, signal="SIGTERM"), 143),
    ],
)
def test_run_that_does_not_finish_raises_the_error_of_its_exit_code(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[TrainerError],
    event: Any,
    code: int,
) -> None:
    play(tmp_path, monkeypatch, f"{says(step_line(1), event.to_line())} exit {code}")
    with pytest.raises(kind, match=r"remedy:(.|\n)*exit code") as caught:
        train(**values)
    assert caught.value.exit_code == code


def test_every_problem_of_the_values_is_in_the_error(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        train(**values | {"learning_rate": "fast", "lora_rang": 8})
    assert "learning_rate" in str(caught.value)
    assert "did you mean lora_r" in str(caught.value)


def test_values_override_the_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 1.0e-3\nlora_r: 4\nmax_steps: 5\n")
    monkeypatch.setenv("LORA_TRAINER_LORA_R", "8")
    monkeypatch.setenv("LORA_TRAINER_MAX_STEPS", "6")
    settings = load_config(tmp_path / "run.yaml", max_steps=7)
    config = settings.config
    assert (config.training.learning_rate, config.lora.lora_r) == (1e-3, 8)
    assert config.training.max_steps == 7
    assert str(settings.origins["max_steps"]) == "argument max_steps"


def test_loaded_config_takes_no_more_values() -> None:
    with pytest.raises(TypeError, match="load_config"):
        train(load_config(max_steps=1), max_steps=2)


def test_listener_gets_every_event_with_the_status_after_it(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch, says(step_line(1), step_line(2), FINISHED))
    heard: list[tuple[str, int]] = []
    train(**values, on_event=lambda event, status: heard.append((event.kind, status.step)))
    assert ("step", 1) in heard
    assert heard[-1] == ("ended", 2)


def test_run_in_a_thread_leaves_environment_and_streams_as_they_were(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, monkeypatch, f"env > {tmp_path}/env; {says(step_line(1), FINISHED)}")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    before = dict(os.environ), sys.stdout, sys.stderr
    thread = threading.Thread(target=lambda: train(**values))
    thread.start()
    thread.join()
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in (tmp_path / "env").read_text()
    assert (dict(os.environ), sys.stdout, sys.stderr) == before
    assert (tmp_path / "out" / "DONE").is_file()


def test_import_is_light_and_train_stays_callable() -> None:
    code = (
        "import sys, lora_trainer\n"
        "print([name for name in sys.modules if name.startswith('lora_trainer.')])\n"
        "import lora_trainer.train.identity\n"
        "from lora_trainer import load_config, train\n"
        "print(callable(train), callable(lora_trainer.train), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["[]", "True True False"]


def test_every_name_is_there_with_types_and_a_docstring() -> None:
    assert {name for name in lora_trainer.__all__ if getattr(lora_trainer, name).__doc__} == set(
        lora_trainer.__all__
    )
    for function in (api.train, api.load_config):
        assert inspect.signature(function).return_annotation != inspect.Signature.empty
    assert (Path(lora_trainer.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="nothing"):
        lora_trainer.nothing  # noqa: B018


def test_notebook_of_the_guide_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # What it leaves to the defaults is smaller here: the model, and the port.
    monkeypatch.setenv("LORA_TRAINER_MODEL_NAME_OR_PATH", str(write_model(tmp_path / "model")))
    monkeypatch.setenv("LORA_TRAINER_HEALTH_PORT", "0")
    cells = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, GUIDE.name, "exec"), names)
    assert names["results"].status == "finished"
    assert (Path(names["config"].config.output.output_dir) / "final_model").is_dir()
    assert "did you mean learning_rate" in capsys.readouterr().out
