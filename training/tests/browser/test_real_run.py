"""The page beside a real run of the tiny model: from loading to the end, and opened again later."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.page import PHONE, Page
from support.tiny_model import write_rows
from support.trainer import Run, Trainer

STEPS, KILLED_AFTER = 150, 60
CHANGED: dict[str, Any] = {
    "max_steps": STEPS, "save_steps": 20, "eval_steps": 50, "eval_generate": True,
    "eval_max_new_tokens": 8, "sample_count": 2, "run_name": "tiny", "health_linger_seconds": 900,
    "load_best_model_at_end": False,
}  # fmt: skip


@dataclass
class Watched:
    """What the page showed while the run went on and its worker was killed once."""

    output: Path
    url: str
    phases: list[str] = field(default_factory=list)
    inked: dict[str, int] = field(default_factory=dict)
    reloads: int = 0
    errors: list[str] = field(default_factory=list)
    at_end: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def watched(browser: Page, trainer: Trainer) -> Iterator[Watched]:
    held_out = write_rows(trainer.root / "few.jsonl", 900, 6)
    run = trainer.start(trainer.root / "out", eval_dataset=str(held_out), **CHANGED)
    try:
        yield watch(browser, run, trainer.root / "out" / "tiny")
    finally:
        run.process.send_signal(signal.SIGTERM)
        run.wait()


def watch(page: Page, run: Run, output: Path) -> Watched:
    """Open the page before the first step, kill the worker after some, stay until the end."""
    run.output = output
    run.wait_for(lambda event: event["event"] == "run_started")
    seen = Watched(output, json.loads((output / "server.json").read_text())["url"])
    page.open(seen.url)
    page.wait_for_text("#connection", "Live")
    page.js("""window.isSame = true; window.phases = [];
        new MutationObserver(() => phases.push(phase.textContent))
          .observe(phase, { childList: true, characterData: true, subtree: true })""")
    run.wait_for(lambda event: event.get("step", 0) >= KILLED_AFTER)
    os.kill(run.worker, signal.SIGKILL)
    page.wait_for_text("#timeline", "Worker ended")
    run.wait_for(lambda event: event["event"] == "ended")
    page.wait_for_text("#phase", "finished")
    page.resize((1440, 4000))
    for chart in ("loss", "speed", "norm", "rate", "memory", "host"):
        page.wait_for(f"the curve of {chart}", lambda chart=chart: page.inked(chart) > 50)
        seen.inked[chart] = page.inked(chart)
    for part in ("done", "held-out", "samples", "timeline", "checkpoints", "about", "plan", "left"):
        seen.at_end[part] = page.text(f"#{part}")
    page.shoot("real-run-desktop-light", "light")
    page.resize(PHONE)
    page.shoot("real-run-phone-dark", "dark")
    seen.reloads = 0 if page.js("return window.isSame") else 1
    seen.phases = page.js("return phases")
    seen.errors = page.errors()
    return seen


def test_every_chart_is_filled(watched):
    assert min(watched.inked.values()) > 50


def test_a_worker_that_is_killed_comes_back_without_a_reload(watched):
    assert watched.reloads == 0
    assert "Resumed from the checkpoint of step" in watched.at_end["timeline"]


def test_the_phases_are_seen_as_they_come(watched):
    assert {"loading", "training", "finished"} <= set(watched.phases)


def test_nothing_fails_in_the_console(watched):
    assert watched.errors == []


def test_what_was_learnt_is_shown(watched):
    assert f"Step {STEPS} of {STEPS}" in watched.at_end["done"]
    assert "took" in watched.at_end["left"]
    assert "Exact match" in watched.at_end["held-out"]
    assert "What follows 9" in watched.at_end["samples"]
    assert "step-000140" in watched.at_end["checkpoints"]
    assert "float32" in watched.at_end["about"]


def test_a_recorded_run_can_be_opened_later(page, trainer, watched):
    with recorded(trainer, watched.output) as url:
        page.open(url)
        page.wait_for_text("#phase", "finished")
        page.wait_for("the curve", lambda: page.inked("loss") > 50)
        for part in ("held-out", "checkpoints", "done"):
            assert page.text(f"#{part}") == watched.at_end[part]
        assert page.text("#left") == watched.at_end["left"]
        assert page.errors() == []


@contextlib.contextmanager
def recorded(trainer: Trainer, output: Path) -> Iterator[str]:
    """Serve a recorded run; give the address that the command prints."""
    command = [
        sys.executable, "-m", "lora_trainer", "dashboard", str(output), "--port", "0",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=trainer.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                yield "http://" + line.split("http://")[1].split()[0]
                break
        else:
            raise AssertionError("no address was printed")
    finally:
        process.terminate()
        process.communicate()
