"""A run of several processes: one killed, all stopped, resumed by another number of them.

Dropout included, two ranks end with the bytes of one process: each has one of a step's two
micro-batches, and the sum of two gradients has no order.
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lora_trainer.run.status import replay
from support.extras import needs_deepspeed
from support.same_bytes import assert_losses_near
from support.trainer import (
    Ended,
    Trainer,
    adapter_digest,
    adapter_of,
    at_step,
    events_of,
    of_kind,
    steps_saved,
    wait_until_gone,
)

KILLED, FIRST_STOP, SECOND_STOP = 13, 30, 42
# A run that begins so on two processes has the step of `undisturbed`, and keeps it.
BEGUN_ON_TWO = {"gradient_accumulation_steps": 1}
SET_DIRECTLY = {"train_batch_size": 4}
TOLD = random.Random(8).randrange(2)  # the rank that is killed


@dataclass(frozen=True)
class Chain:
    """One run's folder, and how each start of it ended."""

    output: Path
    killed_by: Ended
    alone: Ended
    sharded: Ended
    saved: list[int]
    status_ranks: int


@pytest.fixture(scope="module")
def chain(trainer: Trainer) -> Chain:
    """Kill one of two ranks, stop both; go on alone, stop; end on two that share the base."""
    output = trainer.root / "ranks"
    run = trainer.start(output, nproc=2, **BEGUN_ON_TWO)
    run.wait_for(at_step(KILLED))
    os.kill(run.ranks()[TOLD], signal.SIGKILL)
    run.wait_for(at_step(FIRST_STOP))
    ranks = run.ranks()
    status = replay((output / "events.jsonl").read_text().splitlines())
    run.process.send_signal(signal.SIGTERM)
    first = run.wait()
    wait_until_gone(ranks)
    saved = steps_saved(output)
    run = trainer.start(output, nproc=1, **BEGUN_ON_TWO)
    run.wait_for(at_step(SECOND_STOP))
    run.process.send_signal(signal.SIGTERM)
    alone = run.wait()
    sharded = trainer.train(output, nproc=2, parallelism="fsdp", **BEGUN_ON_TWO)
    return Chain(output, first, alone, sharded, saved, len(status.ranks))


def test_killed_rank_restarts_the_group_and_is_named(chain: Chain) -> None:
    (restart,) = of_kind(chain.output, "restart")
    assert restart["cause"].startswith(f"rank {TOLD} was killed")
    assert restart["exit_code"] == -signal.SIGKILL


def test_signal_stops_all_ranks_with_the_step_saved(chain: Chain) -> None:
    assert chain.killed_by.code == 143, chain.killed_by.err
    (first, *_) = of_kind(chain.output, "stopped")
    assert first["step"] == chain.saved[-1] >= FIRST_STOP
    assert chain.alone.code == 143, chain.alone.err


def test_run_keeps_its_step_and_changes_the_accumulation_with_the_processes(chain: Chain) -> None:
    plans = [event["plan"] for event in of_kind(chain.output, "plan")]
    batches = [plan["batch"].partition(", in about ")[0] for plan in plans]
    on_two = "2 per device x 1 accumulated x 2 processes = 4 examples"
    alone = "2 per device x 2 accumulated x 1 process = 4 examples"
    assert batches == [on_two, on_two, alone, on_two]
    assert len({plan["run_batch"] for plan in plans}) == 1


def test_status_shows_every_rank_and_names_the_slowest(chain: Chain) -> None:
    assert chain.status_ranks == 2
    for event in of_kind(chain.output, "ranks"):
        seconds = [one["seconds"] for one in event["ranks"]]
        assert event["slowest"] == seconds.index(max(seconds))


def test_run_on_two_ranks_then_one_then_two_sharded_ends_with_the_bytes_of_one(
    chain: Chain, undisturbed: Path
) -> None:
    assert chain.sharded.code == 0, chain.sharded.err
    plans = [event["plan"] for event in of_kind(chain.output, "plan")]
    assert [(plan["processes"], plan["parallelism"]) for plan in plans] == [
        (2, "ddp"), (2, "ddp"), (1, "none"), (2, "fsdp"),
    ]  # fmt: skip
    assert_losses_near(undisturbed, chain.output)
    assert adapter_digest(chain.output) == adapter_digest(undisturbed)


@pytest.fixture(scope="module")
def chain_of_deepspeed(trainer: Trainer) -> tuple[Path, list[Ended]]:
    """Kill one of two ranks that share the base by DeepSpeed, stop both; end alone without it."""
    output = trainer.root / "deepspeed"
    run = trainer.start(output, nproc=2, parallelism="deepspeed", **SET_DIRECTLY)
    run.wait_for(at_step(KILLED))
    os.kill(run.ranks()[TOLD], signal.SIGKILL)
    run.wait_for(at_step(FIRST_STOP))
    run.process.send_signal(signal.SIGTERM)
    return output, [run.wait(), trainer.train(output, nproc=1, **SET_DIRECTLY)]


@needs_deepspeed
def test_run_with_deepspeed_restarts_and_goes_on_without_it(
    chain_of_deepspeed: tuple[Path, list[Ended]], undisturbed: Path
) -> None:
    output, starts = chain_of_deepspeed
    assert [start.code for start in starts] == [143, 0], [start.err for start in starts]
    plans = [event["plan"]["parallelism"] for event in of_kind(output, "plan")]
    assert plans == ["deepspeed", "deepspeed", "none"]
    assert len(of_kind(output, "restart")) == 1
    assert_losses_near(undisturbed, output)
    ended, whole = adapter_of(output), adapter_of(undisturbed)
    assert ended.keys() == whole.keys()
    for name, array in ended.items():
        np.testing.assert_allclose(array, whole[name], atol=1e-4, rtol=0)


def test_each_event_is_told_by_one_rank(chain: Chain) -> None:
    phases = [e for e in events_of(chain.output) if e["event"] == "phase"]
    assert [e["phase"] for e in phases].count("starting") == 4


@pytest.mark.parametrize(
    "parallelism", ["ddp", "fsdp", pytest.param("deepspeed", marks=needs_deepspeed)]
)
def test_two_ranks_start_from_an_adapter_with_its_loss(
    trainer: Trainer, undisturbed: Path, parallelism: str
) -> None:
    output = trainer.root / f"from-adapter-{parallelism}"
    start = {"adapter_name_or_path": str(undisturbed), "learning_rate": 0, "max_steps": 1}
    ended = trainer.train(output, nproc=2, parallelism=parallelism, **start)
    assert ended.code == 0, ended.err
    evaluated = of_kind(undisturbed, "eval")
    exported = of_kind(undisturbed, "finished")[-1]["adapter_step"]
    expected = next(one["eval_loss"] for one in reversed(evaluated) if one["step"] == exported)
    assert of_kind(output, "eval")[0]["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert adapter_digest(output) == adapter_digest(undisturbed)
