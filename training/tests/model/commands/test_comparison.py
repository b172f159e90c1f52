"""Base model and adapter on the same rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lora_trainer import cli
from lora_trainer.commands.evaluate import Comparison, Figures, table
from lora_trainer.commands.given_rows import spread
from lora_trainer.report import progress
from lora_trainer.train import evaluate
from support.run_folders import make_run


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
    assert "held-out" not in shown  # a file that is named may hold rows that were trained on


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
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["questions"]) == (2, 0)
    assert report["after"]["exact_match"] is None


def test_own_held_out_rows_of_a_run_are_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "--eval_fraction=0.5")
    assert cli.main(["evaluate", str(run), "--no-answers", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert 0 < printed["rows"] < 6
    assert printed["is_held_out"]


def test_missing_rows_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run)]) == 78
    assert cli.main(["evaluate", str(run), "--dataset", "nothing.jsonl"]) == 65
    printed = capsys.readouterr().err
    assert "the run has no held-out rows" in printed
    assert "nothing.jsonl" in printed


def test_perplexity_beyond_numbers_is_shown_as_infinite() -> None:
    figures = Figures(loss=99.0, perplexity=None, token_accuracy=0.5, exact_match=None)
    lines = table(Comparison("m", "a", ["d"], True, 1, 0, 9, 2.0, figures, figures))
    assert any(line.split() == ["perplexity", "infinite", "infinite"] for line in lines)
    assert not any("exact" in line for line in lines)


def columns_run(root: Path) -> tuple[Path, Path]:
    """Make a run on a CSV of own columns; return it and the CSV."""
    table = root / "own.csv"
    table.write_text("Question,Answer\n" + "".join(f"q{n},a{n}\n" for n in range(6)))
    columns = '{"instruction": "Question", "output": "Answer"}'
    return make_run(root, f"--dataset_columns={columns}"), table


def test_columns_of_the_run_hold_for_rows_that_have_them_and_for_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table = columns_run(tmp_path)
    for rows, is_left_out in ((table, False), (tmp_path / "held-out.jsonl", True)):
        wanted = ["--dataset", str(rows), "--no-answers", "--json"]
        assert cli.main(["evaluate", str(run), *wanted]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["rows"] == 6
        assert (
            "dataset_columns for instruction, output are left out" in printed.err
        ) == is_left_out


def test_columns_of_other_rows_are_given_by_the_flag(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "d.csv"
    table.write_text("Question,Answer\nq,a\nr,b\n")
    wanted = ["evaluate", str(run), "--dataset", str(table), "--no-answers", "--json"]
    assert cli.main(wanted) == 65
    remedy = next(x for x in capsys.readouterr().err.splitlines() if "remedy:" in x)
    assert cli.main([*wanted, *shlex.split(remedy)[-2:]]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert cli.main([*wanted, "--dataset_columns", "Question"]) == 78
    assert "--dataset_columns is no mapping" in capsys.readouterr().err


def test_answers_are_a_sample_that_is_announced(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["evaluate", str(run), "--dataset", str(run.parent / "held-out.jsonl")]
    assert cli.main([*wanted, "--answer-rows", "2"]) == 0
    printed = capsys.readouterr()
    assert "answers are generated for 2 of 6 rows, spread evenly" in printed.err
    assert "6 rows scored, 2 of them answered" in printed.out


def test_a_sample_is_spread_evenly() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == spread(range(3), 0) == [0, 1, 2]
