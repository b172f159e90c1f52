"""Base model and adapter on the same rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_run import make_run

from lora_trainer import cli
from lora_trainer.commands.evaluate import Comparison, Figures, table
from lora_trainer.report import progress
from lora_trainer.train import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


def test_figures_are_those_of_each_model_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = run.parent / "held-out.jsonl", tmp_path / "deep" / "out.json"
    assert cli.main(["evaluate", str(run), "--dataset", str(rows), "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    both = json.loads(out.read_text())
    assert cli.main(["evaluate", str(run.parent / "model"), "--dataset", str(rows), "--json"]) == 0
    base = json.loads(capsys.readouterr().out)
    assert base["before"] is None
    assert both["before"] == pytest.approx(base["after"], rel=1e-5)
    assert both["after"]["loss"] != pytest.approx(base["after"]["loss"], rel=1e-2)
    assert (both["rows"], both["questions"]) == (6, 6)
    for name in ("before", "after", "exact match", "loss", "perplexity", "token accuracy"):
        assert name in shown


def test_progress_and_time_left_are_shown_where_there_is_no_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(evaluate, "LISTEN_SECONDS", 0.0)
    rows = str(run.parent / "held-out.jsonl")
    assert cli.main(["evaluate", str(run), "--dataset", rows, "--json"]) == 0
    printed = capsys.readouterr()
    for who in ("the base model", "the adapter"):
        assert re.search(rf"scoring with {who}: \d of 6 rows", printed.err)
        line = rf"answering with {who}: \d of 6 prompts, [\d.]+%, \d:\d\d left"
        assert len(re.findall(line, printed.err)) > 3
    assert json.loads(printed.out)["questions"] == 6


def test_rows_and_answers_can_be_fewer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(run.parent / "held-out.jsonl")
    wanted = ["--dataset", rows, "--rows", "2", "--no-answers", "--json"]
    assert cli.main(["evaluate", str(run), *wanted]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["questions"]) == (2, 0)
    assert found["after"]["exact_match"] is None


def test_own_held_out_rows_of_a_run_are_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "--eval_fraction=0.5")
    assert cli.main(["evaluate", str(run), "--no-answers", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["rows"] < 6


def test_missing_rows_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run)]) == 78
    assert cli.main(["evaluate", str(run), "--dataset", "nothing.jsonl"]) == 65
    told = capsys.readouterr().err
    assert "no held-out rows of its own" in told
    assert "nothing.jsonl" in told


def test_perplexity_beyond_numbers_is_shown_as_infinite() -> None:
    figures = Figures(loss=99.0, perplexity=None, token_accuracy=0.5, exact_match=None)
    lines = table(Comparison("m", "a", ["d"], 1, 0, 9, 2.0, figures, figures))
    assert any(line.split() == ["perplexity", "infinite", "infinite"] for line in lines)
    assert not any("exact" in line for line in lines)
