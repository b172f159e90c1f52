"""What the page shows of a run: its state, its faults, its figures, on any screen."""

from __future__ import annotations

import json
import urllib.request
from functools import reduce

import pytest

from browser.conftest import Serve
from lora_trainer.report.text import total_time
from lora_trainer.run.status import RunStatus, fold
from lora_trainer.serve import app
from support.page import DESKTOP, PHONE, TABLET, Page
from support.page_runs import HOSTILE, REMEDY, failed, finished, going_on

STATES = {"going-on": going_on, "failed": failed, "finished": finished}
CHARTS = ("loss", "speed", "norm", "rate", "memory")


def opened(page: Page, serve: Serve, events, size=DESKTOP, **preferences) -> str:
    url = serve(*events).url
    page.open(url, size, **preferences)
    page.wait_for_text("#connection", "Live")
    page.wait_for_text("#run-name", "demo")
    page.wait_for("the loss curve", lambda: page.inked("loss") > 100)
    return url


def test_a_run_under_way_is_told_at_the_top(page, serve):
    opened(page, serve, going_on())
    page.wait_for_text("#left", "left")
    assert page.text("#phase") == "training"
    assert page.text("#health").startswith("Healthy")
    assert "Step 120 of 200 · 60% · epoch 2.40" in page.text("#done")
    assert page.driver.title == "60% training · demo"
    assert page.errors() == []


def test_every_chart_has_a_curve_a_summary_and_a_table(page, serve):
    opened(page, serve, going_on())
    page.resize((DESKTOP[0], 4000))
    for chart in CHARTS:
        page.wait_for(chart, lambda chart=chart: page.inked(chart) > 50)
        summary = page.summary(chart)
        assert "to step 120" in summary
        page.js("document.querySelector(arguments[0]).open = true", f"#chart-{chart} details")
        page.wait_for_text(f"#chart-{chart} table", "step 120")
    assert page.inked("loss", "held") > 20
    page.wait_for("the host's memory", lambda: "GB" in page.text("#tiles"))
    assert page.errors() == []


def test_smoothing_range_and_scale_can_be_set(page, serve):
    opened(page, serve, going_on())
    before = page.inked("loss")
    set_value = """const node = document.getElementById(arguments[0]);
        node.value = arguments[1]; node.dispatchEvent(new Event("input"));
        node.dispatchEvent(new Event("change"))"""
    page.js(set_value, "smoothing", "0")
    assert page.text("#smoothing-value") == "off"
    page.wait_for("another curve", lambda: page.inked("loss") != before)
    page.js(set_value, "range", "0.1")
    page.wait_for("the last tenth", lambda: "step 108 to step 120" in page.summary("loss"))
    page.js("document.getElementById('log-scale').click()")
    page.wait_for("a logarithmic curve", lambda: page.inked("loss") > 100)
    assert page.errors() == []


def test_no_step_of_a_short_run_is_labelled_twice(page, serve):
    opened(page, serve, going_on())
    ticks = page.js(
        """return Bokeh.documents.flatMap((one) => one.roots())
        .map((figure) => [[...figure.xaxis][0].ticker, figure.x_range])
        .filter(([ticker]) => ticker.min_interval !== undefined && ticker.base === 10)
        .map(([ticker, range]) => ticker.get_ticks(1, 3, range, 0).major)"""
    )
    assert ticks
    assert all(step == int(step) for chart in ticks for step in chart), ticks


def test_a_failure_says_what_where_why_and_what_helps(page, serve):
    opened(page, serve, failed())
    assert page.text("#phase") == "failed"
    for part in (
        "exit code 70",
        "the loss is not finite",
        "step 120, learning_rate",
        "212",
        REMEDY,
    ):
        assert part in page.text("#trouble")
    assert page.text("#health").startswith("Unhealthy")
    assert page.driver.title.startswith("⚠")


def test_an_unhealthy_run_says_why_and_what_helps(page, serve):
    server = serve(*going_on())
    server.live.is_abandoned = True
    page.open(server.url)
    page.wait_for_text("#trouble", "the run's process died")
    assert "run the same command again" in page.text("#trouble")
    page.wait_for_text("#left", "stopped after")
    server.live.is_abandoned = False
    page.wait_for("health again", lambda: not page.is_shown("#trouble"))
    assert page.text("#health").startswith("Healthy")


def test_a_finished_run_shows_its_mean_speed_as_the_report_does(page, serve):
    url = opened(page, serve, finished())
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        mean = json.load(answer)["mean_tokens_per_second"]
    page.wait_for_text("#tiles", f"mean {round(mean):,}, ")


def test_a_finished_run_took_as_long_as_terminal_and_report_say(page, serve):
    events = finished()
    opened(page, serve, events)
    total = total_time(reduce(fold, events, RunStatus())).removesuffix(" in total")
    minutes, seconds = map(int, total.split(":"))
    page.wait_for_text("#left", f"took {minutes} min {seconds} s")


def test_a_finished_run_shows_what_was_learnt(page, serve):
    opened(page, serve, finished())
    assert page.text("#phase") == "finished"
    assert "took" in page.text("#left")
    assert "0.0%75.0%+75.0 pts" in page.text("#held-out")
    assert "as expected" in page.text("#samples")
    assert not page.is_shown("#trouble")


def test_checkpoints_restarts_and_warnings_stand_in_the_timeline(page, serve):
    opened(page, serve, going_on())
    timeline = page.text("#timeline")
    for part in ("Checkpoint of step 120", "Worker ended", "Resumed from", "bf16 is emulated"):
        assert part in timeline
    assert "step-000" not in page.text("#warnings")
    assert "padding-free: proven" in page.text("#plan")


def test_an_answer_is_text_whatever_it_holds(page, serve):
    opened(page, serve, [*going_on(answer=HOSTILE), *finished(HOSTILE)[-3:]])
    assert HOSTILE in page.text("#samples")
    assert page.js("return document.querySelectorAll('main img, main script').length") == 0
    assert page.js("return window.hacked") is None
    assert page.errors() == []


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_wider_than_the_screen(page, serve, state):
    opened(page, serve, STATES[state]())
    for name, size in (("phone", PHONE), ("tablet", TABLET), ("desktop", DESKTOP)):
        page.resize(size)
        page.wait_for("the curve", lambda: page.inked("loss") > 50)
        assert page.js("return document.documentElement.scrollWidth") <= size[0]
        for scheme in ("light", "dark"):
            page.shoot(f"{state}-{name}-{scheme}", scheme)


def test_the_page_is_dark_where_the_system_is_and_remembers_another_choice(page, serve):
    lightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
    url = opened(page, serve, going_on(), scheme="dark")
    assert int(page.js(lightness)) < 60
    for wanted in ("Theme: light", "Theme: dark"):
        page.js("document.getElementById('theme').click()")
        assert page.text("#theme") == wanted
    page.open(url, scheme="light")
    try:
        assert int(page.js(lightness)) < 60
        page.wait_for("the curve in its dark colour", lambda: page.inked("loss") > 100)
    finally:
        page.js("localStorage.clear()")


def test_without_the_chart_library_the_figures_stand_in_tables(page, serve, monkeypatch):
    monkeypatch.setattr(app, "LIBRARY", "a_package_that_is_not_there")
    page.open(serve(*going_on()).url)
    page.wait_for_text("#chart-loss table", "step 120")
    assert page.is_shown("#no-charts")
    assert all("404" in error or "MIME" in error for error in page.errors())


def test_a_token_is_given_once_and_leaves_the_address(page, serve):
    server = serve(*going_on(), token="a-long-secret")
    page.open(f"{server.url}/?token=a-long-secret")
    page.wait_for_text("#connection", "Live")
    assert "token" not in page.driver.current_url
    assert "a-long-secret" not in json.dumps(page.js("return document.cookie"))
