"""Fifty SIGKILLs, twenty SIGTERMs and full disks over all phases of a run: always the same bytes.

What is real: each run is the real supervisor and the real worker, in processes of their own, on
real files, ended by real signals or by a disk that is really full. The instants are seeded: an
event, and up to 50 ms more. What is not: processes are forked from one that has imported torch
already (`zygote.py`), so no signal meets an import; `test_resume.py` has that. Each call of a save
is made to fail in `tests/model/train/test_checkpoint.py`, where 1,000 bits are flipped as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.small_disk import fill, small_disk
from support.trainer import (
    EVAL_STEPS,
    STEPS,
    Event,
    Run,
    Trainer,
    adapter_digest,
    at_phase,
    at_step,
    losses,
    of_kind,
    steps_saved,
    wait_until_gone,
)

# Instants and files are those of our processes; what a stack computes again is in test_resume.py.
pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(1200)]
LIVES, KILLS_A_LIFE, TERMS = 5, 10, 20
MOST_DELAY_SECONDS = 0.05
Instant = Callable[[Event], bool]


def assert_same_as(undisturbed: Path, output: Path) -> None:
    assert losses(output) == losses(undisturbed)
    evaluated, expected = (
        {event["step"]: event["eval_loss"] for event in of_kind(one, "eval")}
        for one in (output, undisturbed)
    )
    assert evaluated == expected
    assert adapter_digest(output) == adapter_digest(undisturbed)
    assert f"{STEPS} of {STEPS}" in (output / "report.html").read_text()
    assert (output / "DONE").exists()


def soon(instant: Instant) -> Instant:
    """Return whether an event is the instant, or the run is past it: its export begins."""
    return lambda event: instant(event) or at_phase("exporting")(event)


def has_ended(event: Event) -> bool:
    """Return whether the supervisor is about to write the report, and then DONE."""
    return event["event"] == "ended"


def instants_of_a_life(draw: random.Random) -> list[Instant]:
    """Return instants in the order in which a run that is killed at each one meets them."""
    steps = sorted(draw.sample(range(2, STEPS - 1), 3))
    evaluation = draw.randrange(1, STEPS // EVAL_STEPS + 1) * EVAL_STEPS
    middle = [
        *((step, at_step(step)) for step in steps),
        (draw.choice(steps) + 1, at_phase("saving")),
        (evaluation, at_phase("evaluating", evaluation)),
        (draw.randrange(STEPS), at_phase("loading")),
    ]
    start = draw.choice(["starting", "loading", "tokenizing", "evaluating"])
    last = [at_phase("evaluating", STEPS), at_phase("exporting"), has_ended]
    in_order = [instant for _, instant in sorted(middle, key=lambda one: one[0])]
    return [at_phase(start), *in_order, *last]


def kill(run: Run, victim: str) -> None:
    """Kill all processes of a run as a power cut does, or one of them alone."""
    family = run.family()
    if victim == "supervisor":
        run.process.kill()
        run.process.communicate()
    elif victim == "worker" and len(family) > 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(family[1], signal.SIGKILL)
        # The supervisor starts another one, which may train on: it ends here as well.
        time.sleep(0.05)
        run.kill()
    else:
        run.kill()
    wait_until_gone(family)


@pytest.mark.parametrize("life", range(LIVES))
def test_ten_kills_at_seeded_instants_change_nothing(
    trainer: Trainer, undisturbed: Path, life: int
) -> None:
    draw = random.Random(f"kills {life}")
    output = trainer.root / f"life-{life}"
    instants = instants_of_a_life(draw)
    assert len(instants) == KILLS_A_LIFE
    for number, instant in enumerate(instants):
        run = trainer.start(output, dataset_cache_dir=str(trainer.root / f"cache-{life}"))
        run.wait_for(soon(instant) if instant is not has_ended else has_ended)
        time.sleep(draw.uniform(0, MOST_DELAY_SECONDS) * (number < KILLS_A_LIFE - 1))
        kill(run, draw.choice(["all", "all", "worker", "supervisor"]))
    ended = trainer.start(output).wait()
    assert ended.code == 0, ended.err
    assert_same_as(undisturbed, output)


def test_twenty_stop_signals_end_with_143_and_change_nothing(
    trainer: Trainer, undisturbed: Path
) -> None:
    draw = random.Random("stops")
    output = trainer.root / "stopped-often"
    steps = sorted(draw.sample(range(2, STEPS - 1), TERMS - 4))
    instants = [
        at_phase("loading"),
        at_phase("evaluating"),
        *map(at_step, steps),
        at_phase("evaluating", STEPS),
        at_phase("evaluating", STEPS),
    ]
    assert len(instants) == TERMS
    for instant in instants:
        before = steps_saved(output)
        run = trainer.start(output)
        run.wait_for(soon(instant))
        time.sleep(draw.uniform(0, MOST_DELAY_SECONDS))
        run.process.send_signal(signal.SIGTERM)
        ended = run.wait()
        if (output / "DONE").exists():  # it was over before the signal was heard
            assert ended.code == 0, ended.err
            break
        assert ended.code == 143, ended.err
        assert "run the same command again" in ended.block
        trained = max(losses(output), default=0)
        assert max(steps_saved(output), default=0) == trained or steps_saved(output) == before
    ended = trainer.start(output, on_finished="stop").wait()
    assert ended.code == 0, ended.err
    assert_same_as(undisturbed, output)


# Where the disk becomes full, and how many bytes it still takes.
FULL = [
    (at_phase("starting"), 0),
    (at_phase("tokenizing"), 0),
    (at_phase("tokenizing"), 60_000),
    (at_phase("evaluating"), 0),
    (at_step(3), 0),
    (at_phase("saving"), 0),
    (at_phase("saving"), 100_000),
    (at_step(EVAL_STEPS), 150_000),
    (at_phase("evaluating", STEPS), 0),
    (at_phase("exporting"), 0),
    (at_phase("exporting"), 40_000),
    (at_phase("exporting"), 150_000),
    (has_ended, 0),
    (has_ended, 30_000),
]


def test_full_disk_at_any_writer_loses_nothing(trainer: Trainer, undisturbed: Path) -> None:
    """The disk becomes full at each instant; with room again, the same command goes on."""
    codes = []
    with small_disk(trainer.root / "series-disk") as disk:
        output = disk / "run"
        places = {"dataset_cache_dir": str(disk / "cache")}
        for instant, spare in FULL:
            run = trainer.start(output, **places)
            run.wait_for(soon(instant) if instant is not has_ended else has_ended)
            with run.frozen():  # filling takes longer than the steps of a tiny model
                fill(disk / "filler")
                with (disk / "filler").open("ab") as file:
                    file.truncate(max(0, file.tell() - spare))
            ended = run.wait()
            codes.append(ended.code)
            assert ended.code in (0, 74), ended.err
            assert "Traceback" not in ended.err
            if ended.code == 74:
                assert "exit code 74" in ended.block
                assert "df -h" in ended.block or "free some" in ended.block
            for name in ("filler", "crumbs"):
                (disk / name).unlink()
            if (output / "DONE").exists():
                break
        ended = trainer.start(output, on_finished="stop", **places).wait()
        assert ended.code == 0, ended.err
        # What a full disk did not take of the recording travelled in the checkpoints.
        assert_same_as(undisturbed, output)
    assert codes.count(74) >= 6
