"""The page of a folder of runs: the list, the curves of those that are chosen, one run's page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_trainer.redaction import Redaction
from lora_trainer.run.events import StepDone
from lora_trainer.run_folder import RunFolder
from lora_trainer.serve.outputs import RunsSite
from lora_trainer.serve.run_state import RunState
from lora_trainer.serve.server import StatusServer
from support.page import DESKTOP, PHONE, Page
from support.page_runs import HOSTILE, failed, finished, going_on

NAMES = ("lr-1e-4", "lr-2e-4", "lr-4e-4", HOSTILE.replace("/", "\u2215"))

RIGHT_EDGES = """
const shown = [...document.querySelectorAll(arguments[0])];
return shown.map((node) => node.getBoundingClientRect().right);
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve four runs: two finished, one failed, one whose process is gone."""
    outputs = tmp_path_factory.mktemp("outputs")
    for number, (name, events) in enumerate(
        zip(NAMES, (finished(), finished(), failed(), going_on()), strict=True)
    ):
        folder = outputs / name
        folder.mkdir()
        faster = [
            replace(event, loss=event.loss * math.exp(-event.step * number / 500))
            if isinstance(event, StepDone)
            else event
            for event in events
        ]
        RunFolder(folder).events.write_text("".join(event.to_line() for event in faster))
        leaf = {"value": 1e-4 * 2**number, "origin": "command line"}
        keys = json.dumps({"training": {"learning_rate": leaf}})
        (folder / "config.resolved.json").write_text(keys)
    live = RunState(Redaction.of({}))
    server = StatusServer(
        live, port=0, make_site=lambda gauges: RunsSite(Path(outputs), live.redaction, gauges)
    )
    server.start()
    yield server.url
    server.stop()


def opened(page: Page, url: str, chosen: tuple[str, ...], size=DESKTOP) -> None:
    page.open(f"{url}/#{'&'.join(chosen)}", size)
    page.wait_for_text("#connection", "Live")
    page.wait_for_text("#runs", NAMES[0])


def test_chosen_runs_are_overlaid_each_in_its_colour(page: Page, url: str):
    opened(page, url, NAMES[:2])
    for ink in ("run0", "run1"):
        page.wait_for(f"the curve of {ink}", lambda ink=ink: page.inked("loss", ink) > 50)
    assert page.inked("loss", "run2") == 0
    page.wait_for_text("#differences", "learning_rate")
    assert "0.00010.0002" in page.text("#differences")
    assert f"{NAMES[1]}: 3" in page.summary("loss")
    assert page.errors() == []


def test_choosing_another_run_adds_its_curve_and_its_address(page: Page, url: str):
    opened(page, url, NAMES[:2])
    page.wait_for("curves", lambda: page.inked("loss", "run1") > 50)
    page.js("document.querySelector(arguments[0]).click()", f'[aria-label="Compare {NAMES[2]}"]')
    page.wait_for("the third curve", lambda: page.inked("loss", "run2") > 50)
    assert page.driver.current_url.endswith(f"#{'&'.join(NAMES[:3])}")
    page.js("document.getElementById('log-scale').click()")
    page.wait_for("a logarithmic curve", lambda: page.inked("loss", "run2") > 50)
    assert page.errors() == []


def test_list_shows_states_and_figures_and_leads_to_each_run(page: Page, url: str):
    opened(page, url, NAMES[:2])
    text = page.text("#runs")
    for part in ("finished", "failed (70)", "interrupted", "200 of 200", "0.0% → 75.0%"):
        assert part in text
    page.js("[...document.querySelectorAll('#runs a')].find((a) => a.text === 'lr-4e-4').click()")
    page.wait_for_text("#trouble", "the loss is not finite")
    page.wait_for_text("#connection", "Live")
    page.wait_for("its curve", lambda: page.inked("loss") > 50)
    page.js("document.getElementById('all-runs').click()")
    page.wait_for_text("#runs", "lr-1e-4")
    assert page.errors() == []


def test_name_of_a_run_is_text_whatever_it_holds(page: Page, url: str):
    opened(page, url, NAMES[:2])
    page.wait_for_text("#runs", NAMES[3])
    assert page.js("return document.querySelectorAll('main img, main script').length") == 0
    assert page.js("return window.hacked") is None


def test_nothing_is_wider_than_the_screen(page: Page, url: str):
    opened(page, url, NAMES[:3])
    for name, size in (("phone", PHONE), ("desktop", DESKTOP)):
        page.resize(size)
        page.wait_for("the curve", lambda: page.inked("loss", "run0") > 50)
        assert page.js("return document.documentElement.scrollWidth") <= size[0]
        assert max(page.js(RIGHT_EDGES, "#runs .pill")) < size[0], "a state is cut off"
        for scheme in ("light", "dark"):
            page.shoot(f"runs-{name}-{scheme}", scheme)
