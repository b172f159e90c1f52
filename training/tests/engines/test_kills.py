"""Killed at ten seeded instants, a run under a launcher ends with the bytes of an undisturbed one.

LORA_TEST_KILLS changes the number of instants of each test. Last results: docs/decisions/0029.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.launched import free_port
from support.trainer import (
    SOURCE,
    Run,
    Trainer,
    adapter_digest,
    events_of,
    losses,
    of_kind,
    wait_until_gone,
)

pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("LORA_TEST_KILLS", "10"))
JOB = {
    "max_steps": 6 * KILLS + 4,
    "train_batch_size": 4,  # with any number of processes
    "save_steps": 3,
    "eval_steps": 0,
    "eval_dataset": None,
    "load_best_model_at_end": False,
    "max_restarts": KILLS + 1,
}
SECONDS = 300.0
PORT = free_port()
Start = Callable[[Trainer, Path], list[Run]]
# Kills something of a rank; nobody starts the processes again where it returns True.
Kill = Callable[[list[Run], int], bool]


def torchrun(trainer: Trainer, output: Path) -> list[Run]:
    """Start two processes by one torchrun."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent += ["--max-restarts", str(KILLS + 1), "--monitor-interval", "0.2"]
    script = str(SOURCE.parent / "train_lora.py")
    command = [*agent, script, *trainer.command(output, **JOB)[4:]]
    return [Run(command, output, trainer.environment())]


def node(trainer: Trainer, output: Path, number: int) -> Run:
    """Start one of two nodes of one process each."""
    own = ("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", f"127.0.0.1:{PORT}")
    return trainer.start(output, *own, "--node_rank", str(number), **JOB)


def nodes(trainer: Trainer, output: Path) -> list[Run]:
    """Start both."""
    return [node(trainer, output, number) for number in range(2)]


def ancestor(levels: int) -> Kill:
    """Return what kills the process so many levels above a rank's worker."""

    def kill(runs: list[Run], rank: int) -> bool:
        workers = [worker for run in runs for worker in run.ranks()]
        process = psutil.Process(workers[rank])
        for _ in range(levels):
            process = process.parent()
        family = [pid for run in runs for pid in run.family()]
        process.kill()
        if is_final := levels >= 2:
            for run in runs:
                assert run.wait().code != 0
            wait_until_gone(family)
        return is_final

    return kill


def host(runs: list[Run], rank: int) -> bool:
    """Kill all processes of a host at once: host 1 may come back, host 0 ends the other."""
    runs[rank].kill()
    if rank == 0:
        assert runs[1].wait().code != 0
    return rank == 0


def wait_for_step(output: Path, starts: int, step: int) -> None:
    """Wait until a start later than so many others does that step."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        begun = 0
        for event in events_of(output):
            begun += event["event"] == "run_started"
            if begun > starts and event["event"] == "step" and event["step"] >= step:
                return
        time.sleep(0.01)
    raise AssertionError("nothing happens")


@pytest.fixture(scope="module")
def alone(trainer: Trainer) -> Path:
    """Return the folder of the run that one process has trained."""
    output = trainer.root / "not-killed"
    ended = trainer.train(output, **JOB)
    assert ended.code == 0, ended.err
    return output


@pytest.mark.parametrize(
    ("start", "kill"),
    [
        pytest.param(torchrun, ancestor(0), id="torchrun-worker"),
        pytest.param(torchrun, ancestor(1), id="torchrun-supervisor"),
        pytest.param(torchrun, ancestor(2), id="torchrun-agent"),
        pytest.param(nodes, ancestor(0), id="nnodes-worker"),
        pytest.param(nodes, ancestor(1), id="nnodes-supervisor"),
        pytest.param(nodes, ancestor(2), id="nnodes-agent"),
        pytest.param(nodes, ancestor(3), id="nnodes-command"),
        pytest.param(nodes, host, id="nnodes-host"),
    ],
)
def test_run_that_is_killed_ends_with_the_bytes_of_an_undisturbed_one(
    trainer: Trainer,
    alone: Path,
    start: Start,
    kill: Kill,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    chance = random.Random(name)
    output = trainer.root / name
    runs, commands = start(trainer, output), 1
    starts = 0
    for number in range(KILLS):
        wait_for_step(output, starts, 2 + 6 * number + chance.randrange(5))
        time.sleep(chance.random() * 0.1)
        starts = len(of_kind(output, "run_started"))
        if kill(runs, number % 2):
            runs, commands = start(trainer, output), commands + 1
        elif kill is host:
            runs[1] = node(trainer, output, 1)
    ended = [run.wait() for run in runs]
    assert [one.code for one in ended] == [0] * len(runs), ended
    print(f"{KILLS} kills, {commands} commands, {len(of_kind(output, 'run_started'))} starts")
    assert losses(output) == losses(alone)
    assert adapter_digest(output) == adapter_digest(alone)
