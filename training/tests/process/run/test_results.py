"""`results.json` says how a run ended, however it ended."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_trainer.config.settings import Settings
from lora_trainer.errors import BusyError, ConfigError, DataError, StoppedError, TrainerError
from lora_trainer.run import lock
from lora_trainer.run.events import Evaluated, Failed, Finished, Generated, Stopped
from lora_trainer.run.recording import read_events
from lora_trainer.run.results import Evaluation, RunResults, read_results
from lora_trainer.run_folder import RunFolder, is_own
from lora_trainer.supervise import endings
from lora_trainer.supervise.supervisor import Supervisor
from support.shell_worker import says, step_line, supervisor_of

Supervise = Callable[..., Supervisor]
REFERENCE = Path(__file__).parents[4] / "docs" / "reference.md"


def evaluated(step: int, loss: float) -> str:
    return Evaluated(
        step=step,
        eval_loss=loss,
        eval_perplexity=math.exp(loss),
        eval_token_accuracy=0.5,
        eval_tokens=9,
        eval_seconds=0.1,
    ).to_line()


def answered(step: int, when: Any, share: float) -> str:
    return Generated(step=step, when=when, exact_match=share, rows=4, seconds=1.0).to_line()


FINISHED = Finished(
    step=2, train_seconds=0.2, tokens_seen=2, peak_memory_bytes=7, results=[], adapter_step=1
).to_line()
WHOLE = (
    evaluated(0, 3.0),
    step_line(1, 2.5),
    evaluated(1, 1.0),
    step_line(2, 0.5),
    evaluated(2, 1.5),
    answered(0, "before", 0.0),
    answered(2, "after", 0.75),
    FINISHED,
)
EXPORTS = 'echo "abc123  adapter_model.safetensors" > {0}/SHA256SUMS'


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    """Return a function that makes a supervisor of a worker that a shell script plays."""
    monkeypatch.setattr(endings, "write_report", lambda _: None)
    return lambda *arguments: supervisor_of(tmp_path, monkeypatch, *arguments)


def ended(run: Supervisor, error: type[TrainerError]) -> RunResults:
    with pytest.raises(error):
        run.run()
    results = read_results(run.output_dir)
    assert RunFolder(run.output_dir).results.is_file()
    assert results is not None
    return results


def test_finished_run_leaves_its_figures(supervise: Supervise, tmp_path: Path) -> None:
    final = tmp_path / "out" / "final_model"
    run = supervise(f"mkdir {final}; {EXPORTS.format(final)}\n{says(*WHOLE)}", "--run_name", "")
    run.run()
    content = json.loads(RunFolder(run.output_dir).results.read_text())
    wanted = {
        "status": "finished",
        "exit_code": 0,
        "steps": 2,
        "first_loss": 2.5,
        "last_loss": 0.5,
        "best_step": 1,
        "best_eval_loss": 1.0,
        "tokens": 2,
        "train_seconds": 0.2,
        "peak_memory_bytes": 7,
        "adapter": "final_model",
        "adapter_step": 1,
        "adapter_sha256": "abc123",
        "problems": [],
    }
    assert {name: content[name] for name in wanted} == wanted
    assert content["seconds"] > 0


def test_evaluation_after_is_that_of_the_exported_adapter(supervise: Supervise) -> None:
    run = supervise(says(*WHOLE))
    run.run()
    results = read_results(run.output_dir)
    assert results is not None
    before, after = results.evaluation_before, results.evaluation_after
    assert before is not None
    assert after is not None
    assert (before.step, before.eval_loss, before.exact_match) == (0, 3.0, 0.0)
    assert (after.step, after.eval_loss, after.exact_match) == (1, 1.0, 0.75)


def test_finished_event_carries_the_same(supervise: Supervise) -> None:
    run = supervise(says(*WHOLE))
    run.run()
    events = list(read_events(RunFolder(run.output_dir).events))
    outcome = next(event.outcome for event in events if isinstance(event, Finished))
    content = json.loads(RunFolder(run.output_dir).results.read_text())
    clock = ("seconds", "ended_time")  # the worker ends after the event
    assert {k: v for k, v in outcome.items() if k not in clock} == {
        k: v for k, v in content.items() if k not in clock
    }


def test_failed_run_leaves_its_problems(supervise: Supervise) -> None:
    problem = {"what": "a bad row", "where": "train.jsonl:3", "why": "", "remedy": "fix it"}
    failure = Failed(exit_code=65, problems=[problem]).to_line()
    results = ended(supervise(f"{says(step_line(1), failure)} exit 65"), DataError)
    assert (results.status, results.exit_code, results.steps) == ("failed", 65, 1)
    assert results.problems == [problem]
    assert results.adapter is None


def test_stopped_run_says_so(supervise: Supervise) -> None:
    stop = Stopped(step=0, signal="SIGTERM").to_line()
    results = ended(supervise(f"{says(step_line(1), stop)} exit 143"), StoppedError)
    assert (results.status, results.exit_code) == ("stopped", 143)
    assert results.problems[0]["what"] == "stopped at step 1"


def test_loss_that_is_not_finite_is_null(supervise: Supervise) -> None:
    run = supervise(says(step_line(1, math.nan)))
    run.run()
    text = RunFolder(run.output_dir).results.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["last_loss"] is None


def refuse(_: Settings) -> None:
    raise ConfigError.of("not like this", remedy="like that")


def test_refused_start_leaves_results_where_there_is_a_folder(
    supervise: Supervise,
) -> None:
    run = supervise("")
    with pytest.raises(ConfigError):
        run.run(refuse)
    assert not run.output_dir.exists()
    run.output_dir.mkdir()
    with pytest.raises(ConfigError):
        run.run(refuse)
    results = read_results(run.output_dir)
    assert results is not None
    assert (results.status, results.exit_code) == ("refused", 78)
    assert results.problems[0]["what"] == "not like this"


def test_refused_start_keeps_the_results_of_the_run_that_is_there(
    supervise: Supervise,
) -> None:
    run = supervise(says(*WHOLE))
    run.run()
    before = RunFolder(run.output_dir).results.read_bytes()
    with pytest.raises(ConfigError):
        supervise("", "--learning_rate", "0.5").run()
    assert RunFolder(run.output_dir).results.read_bytes() == before


def test_start_in_a_busy_folder_writes_nothing(supervise: Supervise) -> None:
    run = supervise("")
    run.output_dir.mkdir()
    with lock.hold(run.output_dir), pytest.raises(BusyError):
        run.run()
    assert not RunFolder(run.output_dir).results.exists()


def test_run_without_results_is_read_from_its_events(supervise: Supervise) -> None:
    run = supervise(says(*WHOLE[:4]))
    run.run()
    RunFolder(run.output_dir).results.unlink()
    lines = RunFolder(run.output_dir).events.read_text().splitlines(keepends=True)
    RunFolder(run.output_dir).events.write_text("".join(lines[:-1]))  # as a kill leaves it
    results = read_results(run.output_dir)
    assert results is not None
    assert (results.status, results.exit_code, results.steps) == ("unfinished", None, 2)


@pytest.mark.parametrize("content", ["", "[]", '{"status": "odd"}', '{"status": "failed"'])
def test_damaged_results_are_no_run(tmp_path: Path, content: str) -> None:
    RunFolder(tmp_path).results.write_text(content)
    assert read_results(tmp_path) is None


def test_results_of_a_newer_version_are_read(tmp_path: Path) -> None:
    content = dataclasses.asdict(RunResults("finished", 0, steps=3)) | {"new_field": 1}
    RunFolder(tmp_path).results.write_text(json.dumps(content))
    assert read_results(tmp_path) == RunResults("finished", 0, steps=3)


def test_next_start_removes_the_results_and_writes_its_own(
    supervise: Supervise, tmp_path: Path
) -> None:
    results = ended(supervise("exit 65"), TrainerError)
    assert results.status == "failed"
    run = supervise(f"test ! -e {tmp_path}/out/{RunFolder.results} || exit 77\n{says(*WHOLE)}")
    run.run()
    later = read_results(run.output_dir)
    assert later is not None
    assert later.status == "finished"


def test_every_field_is_documented() -> None:
    section = REFERENCE.read_text().partition("\n## Results\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    fields = {one.name for kind in (RunResults, Evaluation) for one in dataclasses.fields(kind)}
    assert fields <= named


def test_results_are_archived_with_their_run() -> None:
    assert is_own(RunFolder.results)
