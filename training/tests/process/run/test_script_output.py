"""What `lora-trainer train` prints for scripts: nothing, warnings, or JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_trainer import cli
from lora_trainer.run.events import Finished
from lora_trainer.supervise import endings
from support.shell_worker import says, step_line, supervisor_of

FINISHED = Finished(
    step=1, train_seconds=0.1, tokens_seen=1, peak_memory_bytes=7, results=[], adapter_step=1
)
WHOLE = says(step_line(1), FINISHED.to_line())


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs the command with a worker that a shell script plays."""
    monkeypatch.setattr(endings, "write_report", lambda _: None)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "c.json").write_text(json.dumps({"dataset": "d.jsonl"}))

    def run(script: str, *flags: str) -> int:
        supervisor_of(tmp_path, monkeypatch, script)
        given = ["--output_dir", str(tmp_path / "out"), "--health_port", "0", *flags]
        return cli.main(["train", "--config", str(tmp_path / "c.json"), *given])

    return run


def test_quiet_prints_nothing_of_a_run_that_goes_well(train, capfd) -> None:
    assert train(WHOLE, "--quiet") == 0
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_quiet_prints_a_warning_and_the_error(train, capfd) -> None:
    assert train(WHOLE, "--quiet", "--on_end_command=exit 3") == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "warning: on_end_command ended with exit code 3" in printed.err
    assert train("", "--quiet", "--learning_rate=x") == 78
    assert "exit code 78" in capfd.readouterr().err


def test_json_prints_one_object_a_line_and_nothing_else(train, capfd) -> None:
    assert train(WHOLE, "--log_format", "json") == 0
    printed = capfd.readouterr()
    events = [json.loads(line)["event"] for line in printed.out.splitlines()]
    assert events[:2] == ["note", "run_started"]
    assert events[-3:] == ["step", "finished", "ended"]
    assert printed.err == ""
