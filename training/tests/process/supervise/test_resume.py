"""Killed or stopped at any instant, a run ends with the same bytes as one left alone."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.same_bytes import assert_same_as
from support.trainer import (
    EVAL_STEPS,
    SAVE_STEPS,
    SECONDS,
    STEPS,
    Ended,
    Trainer,
    at_phase,
    at_step,
    losses,
    of_kind,
    steps_saved,
)


def test_kills_of_the_real_command_change_neither_the_losses_nor_the_bytes(
    command_line: Trainer, undisturbed: Path
) -> None:
    output = command_line.root / "killed"
    # The other instants, fifty of them, are those of test_series.py.
    for instant in (at_step(18), at_phase("saving", 32)):
        run = command_line.start(output)
        run.wait_for(instant)
        run.kill()
    command_line.finish(output)
    assert len(of_kind(output, "resumed")) == 2
    assert_same_as(undisturbed, output)


def test_worker_of_a_killed_supervisor_saves_before_the_next_run_begins(
    trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "supervisor-killed"
    run = trainer.start(output)
    run.wait_for(at_step(17))
    run.process.kill()
    ended = trainer.train(output)
    run.process.communicate()
    assert ended.code == 0, ended.err
    (resumed,) = of_kind(output, "resumed")
    # The last checkpoint on the way was of step 15.
    assert resumed["step"] >= 17
    assert_same_as(undisturbed, output)


def test_steps_that_a_stopped_supervisor_never_recorded_are_in_the_figures(
    trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "supervisor-stopped"
    run = trainer.start(output)
    run.wait_for(at_step(2))
    run.process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and max(steps_saved(output), default=0) < 5 * SAVE_STEPS:
        time.sleep(0.01)
    run.kill()
    # The recording ends far before the newest checkpoint, and more than one save is missing.
    assert max(losses(output)) < 3 * SAVE_STEPS
    trainer.finish(output)
    (resumed,) = of_kind(output, "resumed")
    assert resumed["step"] >= 5 * SAVE_STEPS
    assert_same_as(undisturbed, output)
    for kind in ("eval", "generated"):
        steps, expected = ({e["step"] for e in of_kind(o, kind)} for o in (output, undisturbed))
        assert steps == expected
    card, expected_card = (
        (o / "final_model" / "README.md").read_text() for o in (output, undisturbed)
    )
    assert _figures(card) == _figures(expected_card)
    assert f"{STEPS} of {STEPS}" in (output / "report.html").read_text()


def _figures(card: str) -> list[str]:
    """Return the lines of a card that state held-out figures and losses."""
    figures = [line for line in card.splitlines() if "loss" in line.lower()]
    assert len(figures) >= 2
    return figures


@dataclass(frozen=True)
class Stop:
    """How a run answered a signal, and what it left."""

    ended: Ended
    saved: list[int]
    leftovers: list[str]


@pytest.fixture(scope="module")
def stopped(trainer: Trainer) -> tuple[Path, dict[str, Stop]]:
    """Stop one run again and again: the folder, and what came of each signal."""
    output = trainer.root / "stopped"
    stops = {}
    for name, instant, number in (
        ("loading", at_phase("loading"), signal.SIGTERM),
        ("training", at_step(18), signal.SIGTERM),
        ("evaluating", at_phase("evaluating", 3 * EVAL_STEPS), signal.SIGINT),
    ):
        run = trainer.start(output)
        run.wait_for(instant)
        run.process.send_signal(number)
        ended = run.wait()
        left = [path.name for path in (output / "checkpoints").glob(".*")]
        stops[name] = Stop(ended, steps_saved(output), left)
    return output, stops


@pytest.mark.parametrize("name", ["loading", "training", "evaluating"])
def test_signal_ends_with_its_own_exit_code_and_says_how_to_go_on(
    stopped: tuple[Path, dict[str, Stop]], name: str
) -> None:
    ended = stopped[1][name].ended
    assert ended.code == 143, ended.err
    assert "run the same command again" in ended.block
    assert "Traceback" not in ended.err


def test_signal_while_loading_leaves_nothing_half_done(
    stopped: tuple[Path, dict[str, Stop]],
) -> None:
    stop = stopped[1]["loading"]
    assert (stop.saved, stop.leftovers) == ([], [])
    assert "before the first step" in stop.ended.block


def test_signal_while_training_saves_the_step_it_came_in(
    stopped: tuple[Path, dict[str, Stop]],
) -> None:
    output, stops = stopped
    trained = {event["step"] for event in of_kind(output, "step")}
    assert 18 <= stops["training"].saved[-1] < 30
    assert stops["training"].saved[-1] in trained


def test_signal_while_evaluating_saves_that_step_unevaluated(
    stopped: tuple[Path, dict[str, Stop]],
) -> None:
    output, stops = stopped
    step = 3 * EVAL_STEPS
    assert stops["evaluating"].saved[-1] == step
    assert step not in {event["step"] for event in of_kind(output, "eval")}


def test_stopped_run_ends_with_the_same_bytes(
    trainer: Trainer, undisturbed: Path, stopped: tuple[Path, dict[str, Stop]]
) -> None:
    output, _ = stopped
    ended = trainer.train(output)
    assert ended.code == 0, ended.err
    assert_same_as(undisturbed, output)
