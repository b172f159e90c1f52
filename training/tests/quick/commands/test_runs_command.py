"""Several runs in a folder: listed, compared, removed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lora_trainer.cli import main
from lora_trainer.commands.remove import remove_run
from lora_trainer.errors import BusyError, ConfigError
from lora_trainer.report.comparison import differing_keys, notes, read_compared
from lora_trainer.run.events import Ended, Failed, Planned
from lora_trainer.run.lock import hold
from lora_trainer.run.results import read_results, write_results
from lora_trainer.run.summary import find_run, run_folders, summaries, summarize
from lora_trainer.run_folder import RunFolder
from support.recorded_runs import END, hold_by, make_run
from support.run_events import RUN, evaluated, started, stepped

PID_OF_NOBODY = 2**22 + 1
FAILED = Failed(time=3.0, exit_code=70, problems=[{"what": "the loss is not finite"}])
BROKEN = (started(), stepped(1), FAILED, Ended(time=4.0, exit_code=70))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Return a folder with a finished run and one of another learning rate that failed."""
    later = [replace(event, time=event.time + 500) for event in BROKEN]
    (make_run(tmp_path / "good", *RUN, END, learning_rate=1e-4, seed=7) / RunFolder.done).touch()
    make_run(tmp_path / "bad", *later, learning_rate=1.0, seed=7)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_runs_are_listed_newest_first_with_their_figures(outputs: Path):
    bad, good = summaries(outputs)
    assert (bad.name, bad.state, bad.exit_code, bad.step) == ("bad", "failed", 70, 1)
    assert (good.name, good.state, good.exit_code) == ("good", "finished", 0)
    assert (good.step, good.total_steps) == (40, 40)
    assert (good.first_loss, good.last_loss) == (1.0, 1.0)
    assert (good.eval_loss_before, good.eval_loss, good.best_step) == (2.5, 0.25, 40)
    assert (good.exact_match_before, good.exact_match) == (0.0, 0.75)
    assert good.seconds == 100.0


def test_list_is_a_table_for_people_and_json_for_programs(outputs: Path, capsys):
    assert main(["runs", str(outputs)]) == 0
    head, bad, good = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["name", "state", "steps"]
    assert bad.split()[:3] == ["bad", "failed", "(70)"]
    assert "40/40" in good
    assert "2.5000 -> 0.2500" in good
    assert "0.0% -> 75.0%" in good
    assert main(["runs", str(outputs), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["bad", "good"]


def test_run_whose_process_lives_is_running_and_one_that_was_killed_interrupted(tmp_path: Path):
    folder = make_run(tmp_path / "a", started(), stepped(1))
    hold_by(folder, os.getpid())
    assert summarize("a", folder).state == "running"
    hold_by(folder, PID_OF_NOBODY)
    assert summarize("a", folder).state == "interrupted"


def test_size_is_of_what_the_run_wrote_without_the_runs_inside(tmp_path: Path):
    make_run(tmp_path, *RUN)
    alone = summarize(".", tmp_path).bytes
    make_run(tmp_path / "named", *RUN)
    assert alone == summarize(".", tmp_path).bytes
    assert list(run_folders(tmp_path)) == [".", "named"]


def test_figures_come_from_results_json_where_a_run_left_one(tmp_path: Path):
    folder = make_run(tmp_path / "a", *RUN, END)
    results = replace(read_results(folder), last_loss=0.125)
    write_results(folder, asdict(results))
    assert summarize("a", folder).last_loss == 0.125
    hold_by(folder, os.getpid())  # it is going on again: the recording is newer
    assert summarize("a", folder).last_loss == 1.0


def test_tensorboard_command_follows_where_it_has_logs(outputs: Path, capsys):
    logs = outputs / "good" / "logs" / "good"
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1.host.2.0").touch()
    main(["runs", str(outputs)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("TensorBoard: ")
    assert line.endswith(f"tensorboard --logdir {outputs}")


def test_run_is_found_by_folder_and_by_name(outputs: Path):
    assert find_run(str(outputs / "good"), Path("elsewhere")) == outputs / "good"
    assert find_run("good", outputs) == outputs / "good"
    with pytest.raises(ConfigError, match="no such run") as caught:
        find_run("godo", outputs)
    assert "bad, good" in caught.value.problems[0].why


def test_comparison_shows_figures_differing_keys_and_losses_on_one_scale(outputs: Path, capsys):
    assert main(["compare", "good", "bad", "--outputs", str(outputs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["good", "bad"]
    assert ["learning_rate", "0.0001", "1"] in [line.split() for line in lines]
    assert not any(line.startswith("seed") for line in lines)
    assert any(line.startswith("good  ") and line.endswith("1 to 1") for line in lines)


def test_comparison_draws_the_curves_into_a_page(outputs: Path, tmp_path: Path, capsys):
    page = tmp_path / "comparison.html"
    code = main(["compare", "good", "bad", "--outputs", str(outputs), "--output", str(page)])
    assert code == 0
    text = page.read_text()
    assert text.count('<polyline class="own run-0"') == 4
    assert "Evaluation loss" in text
    assert "<script" not in text


def test_names_in_the_page_are_text(tmp_path: Path):
    from lora_trainer.report.comparison import comparison_html

    hostile = "<img src=x onerror=alert(1)>"
    runs = [read_compared(hostile, make_run(tmp_path / name, *RUN)) for name in ("a", "b")]
    assert hostile not in comparison_html(runs)


def test_comparison_of_other_held_out_rows_says_so(tmp_path: Path):
    runs = []
    for name in ("a", "b"):
        folder = make_run(tmp_path / name, *RUN)
        (folder / "data.json").write_text(json.dumps({"eval": {"digest": name}}))
        runs.append(read_compared(name, folder))
    assert "not comparable" in notes(runs)[0]
    assert notes(runs[:1]) == []
    assert differing_keys([run.config for run in runs]) == {}


@pytest.mark.parametrize(
    ("digest", "fraction", "is_comparable"),
    [("a", 0.1, True), ("b", 0.1, False), ("a", 0.2, False)],
)
def test_held_out_shares_are_the_same_rows_of_the_same_data(
    tmp_path: Path, digest, fraction, is_comparable
):
    runs = []
    for name, data, share in (("one", "a", 0.1), ("other", digest, fraction)):
        folder = make_run(tmp_path / name, *RUN, eval_fraction=share, seed=7)
        (folder / "data.json").write_text(json.dumps({"train": {"digest": data}}))
        runs.append(read_compared(name, folder))
    assert (notes(runs) == []) is is_comparable


def test_long_paths_are_told_apart_by_their_ends(tmp_path: Path, capsys):
    start = "/home/someone/with/a/long/folder/public/datasets"
    for name in ("a", "b"):
        make_run(tmp_path / name, *RUN, dataset=[f"{start}/{name}.jsonl"])
    assert main(["compare", "a", "b", "--outputs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "datasets/a.jsonl" in out
    assert "datasets/b.jsonl" in out


def test_folder_that_kept_only_its_results_is_a_run(tmp_path: Path, capsys):
    folder = make_run(tmp_path / "a", *RUN, END)
    results = asdict(read_results(folder))
    for name, changed in (("kept", {}), ("refused", {"status": "refused", "exit_code": 65})):
        (tmp_path / "archive" / name).mkdir(parents=True)
        write_results(tmp_path / "archive" / name, results | changed)
    (run,) = summaries(tmp_path / "archive")
    assert (run.name, run.state, run.last_loss) == ("kept", "finished", 1.0)
    assert main(["compare", "kept", "kept", "--outputs", str(tmp_path / "archive")]) == 0


@pytest.mark.parametrize("count", [1, 7])
def test_one_run_or_too_many_cannot_be_compared(outputs: Path, count, capsys):
    assert main(["compare", *["good"] * count, "--outputs", str(outputs)]) == 78
    assert "2 to 6 runs" in capsys.readouterr().err


def test_run_that_diverged_is_compared_too(tmp_path: Path, capsys):
    make_run(tmp_path / "a", *RUN)
    make_run(tmp_path / "b", started(), stepped(1, loss=float("nan")), evaluated(1, float("inf")))
    assert main(["compare", "a", "b", "--outputs", str(tmp_path), "--json"]) == 0
    page = tmp_path / "c.html"
    assert main(["compare", "a", "b", "--outputs", str(tmp_path), "--output", str(page)]) == 0
    assert "NaN" not in capsys.readouterr().out


def test_removed_run_leaves_nothing(outputs: Path, capsys):
    assert main(["rm", "bad", "--yes", "--outputs", str(outputs)]) == 0
    assert not (outputs / "bad").exists()
    assert (outputs / "good" / RunFolder.done).exists()
    assert "removed 5 files" in capsys.readouterr().out


def test_removing_keeps_what_no_run_writes(tmp_path: Path, capsys):
    folder = make_run(tmp_path, *RUN)
    named = make_run(tmp_path / "named", *RUN)
    outside = tmp_path.with_name("outside.txt")
    outside.write_text("mine")
    mine = [folder / name for name in ("final_model/mine.txt", "checkpoints/mine.txt", "mine.txt")]
    for path in mine:
        path.write_text("mine")
    (folder / "logs").symlink_to(outside.parent)
    remove_run(folder, is_sure=True)
    assert sorted(path for path in folder.rglob("*") if named not in path.parents) == sorted(
        [*mine, mine[0].parent, mine[1].parent, named]
    )
    assert outside.read_text() == "mine"
    assert RunFolder(named).events.is_file()
    assert "kept, since no run writes it: checkpoints/mine.txt, final" in capsys.readouterr().out


def test_running_run_is_not_removed(tmp_path: Path):
    folder = make_run(tmp_path / "a", *RUN)
    with hold(folder), pytest.raises(BusyError):
        remove_run(folder, is_sure=True)
    assert RunFolder(folder).events.is_file()


def test_removing_without_a_terminal_has_to_be_confirmed_by_flag(outputs: Path, capsys):
    assert main(["rm", "bad", "--outputs", str(outputs)]) == 78
    assert f"lora-trainer rm {outputs / 'bad'} --yes" in capsys.readouterr().err
    assert (outputs / "bad" / RunFolder.events).is_file()


def test_removing_asks_at_a_terminal(outputs: Path, monkeypatch):
    monkeypatch.setattr("sys.stdin", TerminalInput(["n\n", "y\n"]))
    remove_run(outputs / "bad", is_sure=False)
    assert (outputs / "bad" / RunFolder.events).is_file()
    remove_run(outputs / "bad", is_sure=False)
    assert not (outputs / "bad").exists()


def test_plan_of_a_run_gives_the_steps_to_come(tmp_path: Path):
    plan = Planned(time=0.0, plan={"total_steps": 9})
    assert summarize("a", make_run(tmp_path / "a", started(), plan)).total_steps == 9


class TerminalInput:
    """A terminal at which these lines are typed."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def isatty(self) -> bool:
        return True

    def readline(self, *_: int) -> str:
        return self._lines.pop(0)
