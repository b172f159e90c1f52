"""The report says what became of a run, whatever is missing and whatever its texts hold."""

import json
import re
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser

import pytest

import lora_trainer.report.html
from lora_trainer.report.charts import MOST_POINTS, _label, short, smoothed, thinned
from lora_trainer.report.html import write_report
from lora_trainer.report.text import total_time
from lora_trainer.run import events as kinds
from lora_trainer.run.status import RunStatus, fold
from lora_trainer.units import number
from support.report import FINISHED, RUN, STARTED, evaluated, step

VOID = {"meta", "polyline"}
CONFIG = {
    "training": {
        "seed": {"value": 42, "origin": "default"},
        "learning_rate": {"value": 0.001, "origin": "config.json:14"},
    }
}


def sample(when, answer, prompt="Turn it on"):
    return kinds.Sample(
        time=100.0, step=0 if when == "before" else 3, when=when, index=0,
        prompt=prompt, expected='{"on": true}', answer=answer,
    )  # fmt: skip


class Page(HTMLParser):
    """The page's tags and its readable text; fails on a tag that is not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.words, self.links, self.loaded = [], [], [], [], []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href" and tag == "a"]
        addresses = [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.loaded += addresses if tag != "a" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Write a run folder from events and JSON files, and return its page; no picture."""
    monkeypatch.setattr(lora_trainer.report.html, "_picture", lambda *_: b"")

    def write(events, torn="", **files):
        lines = "".join(event.to_line() for event in events) + torn
        (tmp_path / "events.jsonl").write_text(lines, encoding="utf-8")
        for name, content in files.items():
            (tmp_path / f"{name.replace('_', '.')}.json").write_text(json.dumps(content))
        write_report(tmp_path)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


def test_a_finished_run_shows_its_result_and_its_figures(report):
    text = report(RUN, plan={"total_steps": 3}).text
    assert "lights finished" in text
    assert "Training time 1:15" in text
    assert "Steps 3 of 3" in text
    assert "Speed 200 tokens/s" in text
    assert "Peak memory 3.2 GB" in text


def test_before_stands_beside_after_with_the_change(report):
    text = report(RUN).text
    assert "Exact match, 64 rows 0.0% 93.8% +93.8 points" in text
    assert "Evaluation loss 3.5 0.25 \u22123.25" in text


def test_both_files_are_written_and_nothing_else(tmp_path):
    (tmp_path / "events.jsonl").write_text("".join(event.to_line() for event in RUN))
    assert [path.name for path in write_report(tmp_path)] == ["report.html", "loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_page_links_the_files_that_are_there(report, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert report(RUN).links == ["results.json", "events.jsonl"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    (tmp_path / "events.jsonl").write_text("".join(event.to_line() for event in RUN))
    first, second = ([p.read_bytes() for p in write_report(tmp_path)] for _ in range(2))
    assert first == second


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = report([*RUN, sample("after", "<img src=https://example.org/x onerror=alert(1)>")])
    assert page.loaded == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</pre><h1>x", "\"'><b>&amp;"])
def test_texts_of_the_run_are_shown_and_never_become_tags(report, text):
    page = report(
        [
            kinds.RunStarted(time=1.0, run_name=text, config_digest=text, output_dir=""),
            kinds.PhaseChanged(time=1.0, phase="loading", detail=text),
            kinds.Warned(time=1.0, message=text),
            sample("before", text, prompt=text),
            sample("after", text, prompt=text),
            kinds.CheckpointSaved(time=2.0, step=1, path=text, bytes=1, seconds=1.0),
            kinds.Failed(time=2.0, exit_code=65, problems=[{"what": text, "remedy": text}]),
        ],
        config_resolved={"data": {"dataset": {"value": text, "origin": text}}},
        plan={text: text},
        environment={text: text},
        data={text: text},
    )
    shown = text.replace("_", " ")
    assert page.text.count(shown) >= 12
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("h1") == 1


def test_half_a_surrogate_pair_in_an_answer_does_not_break_the_page(report):
    assert "ok" in report([*RUN, sample("after", "ok \ud800")]).text


def test_an_answer_is_marked_as_expected_or_not(report):
    text = report([*RUN, sample("before", "Sure!"), sample("after", ' {"on": true}\n')]).text
    assert "Base model not as expected Sure!" in text
    assert 'Trained as expected {"on": true}' in text


def test_a_torn_last_line_is_passed_over(report):
    assert "Steps 3" in report(RUN, torn='{"event": "step", "step": 4, "lo').text


def test_an_unfinished_run_says_how_far_it_came(report):
    text = report([*RUN[:5], kinds.PhaseChanged(time=105.0, phase="training")]).text
    assert "unfinished" in text
    assert "last phase: training" in text


def test_a_failed_run_shows_problem_remedy_and_exit_code(report):
    problem = {"what": "the disk is full", "where": "/out", "why": "", "remedy": "df -h /out"}
    failed = kinds.Failed(time=104.0, exit_code=74, problems=[problem])
    text = report([*RUN[:5], failed, kinds.Ended(time=105.0, exit_code=74)]).text
    assert "failed · exit code 74, disk full or I/O" in text
    assert "the disk is full where /out remedy df -h /out" in text


def test_a_worker_that_was_killed_without_a_word_has_failed(report):
    text = report([STARTED, step(1), kinds.Ended(time=105.0, exit_code=137)]).text
    assert "failed · exit code 137, killed for memory" in text


def test_a_perplexity_near_one_keeps_its_digits(report):
    nearly = replace(evaluated(2, 0.004), eval_perplexity=1.0043)
    text = report([STARTED, evaluated(0, 3.5), step(1), step(2), nearly]).text
    assert "1.004" in text


def test_work_that_was_redone_counts_once(report):
    resumed = kinds.Resumed(time=120.0, step=1, path="checkpoints/step-000001")
    text = report([STARTED, *map(step, (1, 2, 3)), evaluated(3, 0.1), resumed, step(2)]).text
    assert "Steps 2" in text
    assert "200 tokens/s 200 tokens" in text
    assert "Lowest evaluation loss" not in text


def test_a_timeline_that_is_too_long_says_what_it_leaves_out(report):
    text = report([STARTED, *(kinds.Warned(time=101.0, message=f"w{i}") for i in range(250))]).text
    assert "51 entries are not shown" in text
    assert "150 more warnings are not shown" in text


def test_a_whole_run_fills_every_part_of_the_page(report):
    """Events, in their order, of a run with evaluations, samples and checkpoints."""
    steps = [step(n, loss=4.0 - n, learning_rate=0.0 if n == 1 else 1e-3) for n in (1, 2, 3)]
    saved = kinds.CheckpointSaved(
        time=103.5, step=3, path="checkpoints/step-000003", bytes=58_878_141, seconds=0.66,
        is_best=True,
    )  # fmt: skip
    page = report(
        [
            STARTED,
            kinds.PhaseChanged(time=100.1, phase="loading", detail="embedded/model"),
            kinds.PhaseChanged(time=100.2, phase="tokenizing"),
            kinds.Progress(time=100.3, done=64, unit="rows"),
            kinds.Planned(time=100.4, plan={"total_steps": 3, "reasons": []}),
            kinds.PhaseChanged(time=100.5, phase="evaluating", detail="answers before training"),
            RUN[2],
            sample("before", "The answer is 15."),
            kinds.PhaseChanged(time=100.6, phase="training"),
            kinds.PhaseChanged(time=100.7, phase="evaluating", detail="step 0"),
            evaluated(0, 3.75),
            kinds.PhaseChanged(time=100.8, phase="training"),
            *steps,
            kinds.PhaseChanged(time=103.1, phase="evaluating", detail="step 3"),
            replace(saved, time=103.0, step=2, path="checkpoints/step-000002"),
            replace(evaluated(3, 0.447), is_best=True),
            kinds.PhaseChanged(time=103.4, phase="saving", detail="step 3"),
            saved,
            kinds.PhaseChanged(time=103.6, phase="evaluating", detail="answers after training"),
            RUN[7],
            sample("after", '{"on": true}'),
            kinds.PhaseChanged(time=103.9, phase="exporting"),
            FINISHED,
            kinds.Ended(time=111.0, exit_code=0),
        ],
        config_resolved=CONFIG,
        plan={"total_steps": 3, "reasons": []},
        environment={"torch": "2.13.0"},
        data={"rows": {"train": 64}},
    )
    for part in (
        "lights finished",
        "Evaluation loss 3.75 0.447 \u22123.3",
        "Lowest evaluation loss: 0.447 at step 3.",
        "Exact match, 64 rows 0.0% 93.8% +93.8 points",
        "Base model not as expected The answer is 15.",
        'Trained as expected {"on": true}',
        "2 59 MB 0.66 s checkpoints/step-000002",  # no longer the best
        "3 best 59 MB 0.66 s checkpoints/step-000003",
        "Tokens per second by step",
        "0:10 Finished at step 3",
    ):
        assert part in page.text


def test_the_total_time_is_that_of_the_terminal(report):
    again = replace(RUN[0], time=RUN[2].time + 500.0)
    later = [replace(event, time=event.time + 600.0) for event in RUN[3:]]
    events = [*RUN[:3], again, *later]
    status = reduce(fold, events, RunStatus())
    assert status.paused_seconds == 500.0
    assert total_time(status) in report(events).text


def test_a_restart_stands_in_the_timeline_with_its_cause(report):
    restart = kinds.Restarted(time=130.0, attempt=1, cause="killed for memory", exit_code=137)
    text = report([*RUN[:5], restart, *RUN[5:]]).text
    assert "0:30 Worker ended with exit code 137 (killed for memory); restart 1" in text


def test_a_loss_that_is_not_finite_is_a_warning_and_no_point(report):
    text = report([STARTED, step(1), step(2, loss=float("nan")), step(3)]).text
    assert "The loss was not finite at step 2" in text
    assert "nan" not in text.lower()


def test_an_evaluation_that_is_not_finite_says_so(report):
    text = report([STARTED, evaluated(0, 3.5), step(1), evaluated(1, float("nan"))]).text
    assert "Evaluation loss 3.5 not finite" in text
    assert "Lowest evaluation loss: 3.5 at step 0." in text


def test_a_run_without_a_finite_loss_still_has_a_page(report, tmp_path):
    assert "not finite" in report([STARTED, step(1, loss=float("inf"))]).text
    assert not (tmp_path / "loss.png").exists()


def test_an_empty_folder_still_gets_a_page(report):
    assert "No training step was done." in report([]).text


def test_a_single_step_is_drawn(tmp_path):
    events = [STARTED, step(1, learning_rate=0.0, grad_norm=0.0)]
    (tmp_path / "events.jsonl").write_text("".join(event.to_line() for event in events))
    assert len(write_report(tmp_path)) == 2


def test_changed_values_come_before_defaults_with_their_origin(report):
    text = report(RUN, config_resolved=CONFIG).text
    assert "learning_rate 0.001 config.json:14 1 defaults left as they are" in text
    assert text.index("learning_rate") < text.index("seed 42 default")


def test_plan_data_and_environment_are_flat_tables(report):
    text = report(
        RUN,
        plan={"reasons": ["a b", "c d"], "memory_limit_bytes": 1 << 31},
        data={"rows": {"train": 12345}},
        environment={"torch": "2.13.0"},
    ).text
    assert "memory limit 2.1 GB" in text
    assert "rows.train 12,345" in text
    assert "torch 2.13.0" in text


def test_a_half_written_json_file_counts_as_missing(report, tmp_path):
    (tmp_path / "plan.json").write_text('{"total_steps": ')
    assert "Plan" not in report(RUN).text


def test_a_long_run_is_drawn_with_few_points_and_its_spike(report, tmp_path):
    report([STARTED, *(step(n, loss=50.0 if n == 3333 else 1.0) for n in range(1, 6001))])
    html = (tmp_path / "report.html").read_text()
    raw = re.search(r'class="raw" points="([^"]*)"', html)[1].split()
    assert len(raw) <= MOST_POINTS
    assert min(float(point.split(",")[1]) for point in raw) == 0.0


def test_thinning_keeps_order_ends_and_extremes():
    points = [(float(x), float(x == 4321)) for x in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept)
    assert (4321.0, 1.0) in kept


def test_smoothing_adds_no_lag():
    line = [(float(x), 2.0 * x) for x in range(300)]
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (0.125, "0.125"), (2e-4, "2e-4"), (0.0, "0")]
)
def test_numbers_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.9433295, "2.9433"), (40.1, "40.1"), (0.0, "0.0000"), (0.00426, "0.00426"),
     (0.000237782, "0.0002378"), (0.25, "0.2500")],
)  # fmt: skip
def test_losses_near_zero_keep_the_digits_that_tell_runs_apart(value, text):
    assert number(value) == text


def test_small_ticks_of_one_axis_are_told_apart():
    ticks = [0.0, 0.0005, 0.001, 0.0015, 0.002]
    assert [_label(tick, ticks) for tick in ticks] == ["0", "5e-4", "1e-3", "1.5e-3", "2e-3"]
