"""The page follows its run: live, across lost connections, and with a long history."""

from __future__ import annotations

import time

import pytest

from lora_trainer.run.events import PhaseChanged, RanksMeasured, Restarted
from lora_trainer.serve import app
from support.page_runs import failed, finished, going_on, step
from support.run_events import evaluated

LONG = 100_000
# Generous: a machine of two busy cores draws slowly. Here it takes a tenth of that.
MOST_SECONDS_TO_OPEN, MOST_SECONDS_BLOCKED = 20.0, 3.0


def test_steps_and_phases_arrive_without_a_reload(page, serve):
    server = serve(*going_on())
    page.open(server.url)
    page.wait_for_text("#done", "Step 120")
    page.js("window.isSame = true")
    for number in range(121, 131):
        server.live.add(step(number, time.time()))
    page.wait_for_text("#done", "Step 130")
    page.wait_for("the new steps' curve", lambda: "to step 130" in page.summary("loss"))
    server.live.add(evaluated(130, 0.123))
    page.wait_for(
        "the new held-out point", lambda: "held out: 0.123 at step 130" in page.summary("loss")
    )
    server.live.add(PhaseChanged(phase="evaluating", detail="held-out rows"))
    page.wait_for_text("#phase", "evaluating")
    page.wait_for_text("#phase-detail", "held-out rows")
    assert page.js("return window.isSame")
    assert page.errors() == []


def test_each_of_several_processes_has_its_row(page, serve):
    server = serve(*going_on())
    page.open(server.url)
    page.wait_for_text("#connection", "Live")
    assert not page.is_shown("#ranks")
    ranks = [
        {"rank": 0, "seconds": 0.5, "tokens": 900, "memory_bytes": 2_000_000_000},
        {"rank": 1, "seconds": 0.7, "tokens": 900, "memory_bytes": 3_000_000_000},
    ]
    server.live.add(RanksMeasured(step=121, ranks=ranks, slowest=1))
    page.wait_for_text("#ranks", "3.0 GB")
    assert len(page.driver.find_elements("css selector", "#ranks tbody tr")) == 2


def test_log_lines_arrive_as_they_are_written(page, serve):
    server = serve(*going_on())
    server.live.add_log("the first line")
    page.open(server.url)
    page.wait_for_text("#log", "the first line")
    server.live.add_log("<b>the second</b> line")
    page.wait_for_text("#log", "<b>the second</b> line")


def test_a_lost_server_is_told_and_found_again(page, serve):
    server = serve(*going_on())
    page.open(server.url)
    page.wait_for_text("#connection", "Live")
    page.js("window.isSame = true")
    server.stop()
    page.wait_for_text("#connection", "Reconnecting")
    assert "Step 120" in page.text("#done"), "what was known stays"
    serve(*going_on(150), port=server.port)
    page.wait_for_text("#connection", "Live")
    page.wait_for_text("#done", "Step 150")
    assert page.js("return window.isSame")


def test_a_stream_that_the_browser_gives_up_is_opened_again(page, serve, monkeypatch):
    monkeypatch.setattr(app, "MOST_STREAMS", 0)  # answered with 503, after which none retries
    page.open(serve(*going_on()).url)
    page.wait_for_text("#connection", "Reconnecting")
    monkeypatch.undo()
    page.wait_for_text("#connection", "Live")


def test_a_worker_that_restarts_is_followed(page, serve):
    server = serve(*going_on())
    page.open(server.url)
    page.wait_for_text("#done", "Step 120")
    server.live.add(Restarted(attempt=2, cause="was killed", exit_code=-9))
    page.wait_for_text("#health", "Unhealthy")
    page.wait_for_text("#trouble", "it resumes from the last checkpoint")
    for event in going_on(100)[-20:]:
        server.live.add(event)
    page.wait_for_text("#done", "Step 100")
    page.wait_for("health again", lambda: not page.is_shown("#trouble"))
    page.wait_for("the curve went back", lambda: "to step 100" in page.summary("loss"))


@pytest.mark.parametrize("end", [finished, failed])
def test_a_server_that_ends_with_its_run_leaves_the_result_on_the_page(page, serve, end):
    server = serve(*end())
    page.open(server.url)
    page.wait_for_text("#connection", "Live")
    page.wait_for_text("#phase", end.__name__)
    server.stop()
    page.wait_for_text("#connection", "Server closed: last known state")
    assert page.text("#phase") == end.__name__


def test_a_hundred_thousand_steps_stay_smooth(page, serve):
    server = serve(*going_on(LONG, 2 * LONG))
    begun = time.monotonic()
    page.open(server.url)
    page.wait_for("the curve", lambda: page.inked("loss") > 100)
    opened_seconds = time.monotonic() - begun
    page.js("""window.longest = 0;
        new PerformanceObserver((list) => {
          for (const { duration } of list.getEntries()) longest = Math.max(longest, duration);
        }).observe({ entryTypes: ["longtask"] })""")
    for number in range(LONG + 1, LONG + 1201):  # more than are kept before a new fetch
        server.live.add(step(number, time.time()))
        time.sleep(0.003)
    page.wait_for_text("#done", "Step 101,200")
    label = "return document.querySelector('#chart-loss .plot').ariaLabel"
    page.wait_for("the newest step's curve", lambda: "to step 101,200" in page.js(label))
    blocked_seconds = page.js("return longest") / 1000
    print(f"opened in {opened_seconds:.1f} s, blocked for {blocked_seconds:.2f} s at most")
    assert opened_seconds < MOST_SECONDS_TO_OPEN
    assert blocked_seconds < MOST_SECONDS_BLOCKED
    assert page.errors() == []
