"""The page for everybody: by keyboard, by ear, and with enough contrast."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from lora_trainer.run.events import PhaseChanged
from support.page import DESKTOP, PHONE, Page
from support.page_runs import failed, finished, going_on, step

STATES = {"going-on": going_on, "failed": failed, "finished": finished}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


def axe_source() -> str:
    """Return axe-core's script, out of its package."""
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")


def violations(page: Page) -> list[str]:
    """Return what axe-core finds fault with, and where."""
    report = page.driver.execute_async_script(
        """const [rules, done] = arguments;
        axe.run(document, { runOnly: rules }).then((r) => done(r.violations))""",
        RULES,
    )
    return [f"{v['id']}: {[node['target'] for node in v['nodes']]}" for v in report]


@pytest.mark.parametrize("state", STATES)
def test_axe_finds_no_fault(page, serve, state):
    server = serve(*STATES[state]())
    server.live.add_log("a line")
    page.open(server.url)
    page.wait_for_text("#connection", "Live")
    page.wait_for_text("#timeline", "Checkpoint")
    page.wait_for("a curve", lambda: page.inked("loss") > 50)
    page.js(axe_source())
    by_scheme = {}
    for scheme, size in (("light", DESKTOP), ("dark", PHONE)):
        page.prefer(scheme)
        page.resize(size)
        by_scheme[scheme] = violations(page)
    assert by_scheme == {"light": [], "dark": []}


def test_every_control_is_reached_by_tab_and_seen_when_it_is(page, serve):
    server = serve(*failed())
    page.open(server.url)
    page.wait_for_text("#connection", "Live")
    page.wait_for_text("#timeline", "Checkpoint")
    reached, unseen = [], []
    for _ in range(60):
        page.press("tab")
        name, width = page.js(
            """const node = document.activeElement;
            return [node.id || node.className || node.textContent.trim().slice(0, 20),
                    parseFloat(getComputedStyle(node).outlineWidth)]"""
        )
        if reached and name == reached[0]:
            break
        reached.append(name)
        if not width:
            unseen.append(name)
    assert reached[0] == "skip"
    assert {"theme", "smoothing", "range", "log-scale"} <= set(reached)
    assert unseen == []


def test_the_skip_link_leads_past_the_header(page, serve):
    page.open(serve(*going_on()).url)
    page.wait_for_text("#connection", "Live")
    page.js("document.querySelector('.skip').focus()")
    page.press("enter")
    assert page.js("return document.activeElement.id") == "main"


def test_phases_are_announced_and_steps_are_not(page, serve):
    server = serve(*going_on())
    page.open(server.url)
    page.wait_for_text("#announcer", "Phase training.")
    page.js("""window.said = [];
        new MutationObserver(() => said.push(announcer.textContent))
          .observe(announcer, { childList: true, characterData: true, subtree: true })""")
    for number in range(121, 126):
        server.live.add(step(number, time.time()))
    page.wait_for_text("#done", "Step 125")
    server.live.add(PhaseChanged(phase="saving"))
    page.wait_for_text("#announcer", "Phase saving.")
    assert page.js("return said") == ["Phase saving."]
    assert page.js("return document.querySelectorAll('[aria-live]').length") == 1


def test_who_wants_no_motion_gets_none(page, serve):
    server = serve(*going_on())
    page.open(server.url, motion="reduce")
    page.wait_for_text("#connection", "Live")
    server.stop()
    page.wait_for_text("#connection", "Reconnecting")
    assert page.js("return document.getAnimations().length") == 0
