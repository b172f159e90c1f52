"""Processes that a launcher has started join one run: rank 0's supervises it.

They are started as by srun or Ray: by variables, with the store served by rank 0.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from support.launched import end_processes, start_processes
from support.same_bytes import assert_losses_near
from support.trainer import (
    STEPS,
    adapter_digest,
    at_step,
    of_kind,
    steps_saved,
    wait_until_gone,
)
from support.zygote import ForkingTrainer

pytestmark = pytest.mark.any_stack  # torch 2.1 is refused: tests/quick/host/test_launcher.py

CHANCE = random.Random(14)
# More of them: docs/decisions/0026.
KILLS = int(os.environ.get("LORA_TEST_KILLS", "2"))
# The step of `undisturbed`, with any number of processes.
SAME_STEP = {"train_batch_size": 4}
VICTIMS = ((1, True), (1, False), (0, True), (0, False))  # rank; its worker, or the process above


def instants(count: int) -> list[int]:
    """Return so many steps of a run, drawn from as many stretches of it."""
    length = (STEPS - 8) // count
    return [4 + number * length + CHANCE.randrange(length) for number in range(count)]


def test_two_processes_end_with_the_bytes_of_one_and_rank_0_alone_speaks(
    trainer: ForkingTrainer, undisturbed: Path
) -> None:
    first, other = end_processes(start_processes(trainer, trainer.root / "two", 2, **SAME_STEP))
    assert (first.code, other.code) == (0, 0), (first.err, other.err)
    assert adapter_digest(trainer.root / "two") == adapter_digest(undisturbed)
    (plan,) = of_kind(trainer.root / "two", "plan")
    assert plan["plan"]["processes"] == 2
    assert other.out == ""
    assert "loss" not in other.err
    again = end_processes(start_processes(trainer, trainer.root / "two", 2, **SAME_STEP))
    assert [one.code for one in again] == [0, 0]  # it is finished


def test_a_config_error_is_printed_once(trainer: ForkingTrainer) -> None:
    first, other = end_processes(
        start_processes(trainer, trainer.root / "wrong", 2, learning_rate=-1)
    )
    assert (first.code, other.code) == (78, 78)
    assert first.err.count("learning_rate") >= 1
    assert other.err == ""


def test_run_whose_processes_are_killed_names_them_and_ends_with_the_bytes_of_one(
    trainer: ForkingTrainer, undisturbed: Path
) -> None:
    output = trainer.root / "killed"
    for number, first in enumerate(instants(KILLS)):
        rank, is_worker = VICTIMS[number % len(VICTIMS)]
        runs = start_processes(trainer, output, 2, **SAME_STEP)
        runs[0].wait_for(at_step(first))
        workers = [run.worker for run in runs]
        os.kill(workers[rank] if is_worker else runs[rank].process.pid, signal.SIGKILL)
        killed = time.monotonic()
        ended = end_processes(runs)
        wait_until_gone(workers)
        assert time.monotonic() - killed < 60
        # The worker of a killed process saves and ends, and with it all others: none has been
        # stopped, so that a launcher starts them again.
        expected = {1: {True: (70, 70), False: (70, -9)}, 0: {True: (137, 70), False: (-9, 70)}}
        codes = tuple(one.code for one in ended)
        assert codes == expected[rank][is_worker], ended
        if rank == 1:
            assert f"lost rank 1 on {socket.gethostname()}" in ended[0].block
            assert is_worker or "its supervisor was killed" in ended[0].block
    assert [
        one.code for one in end_processes(start_processes(trainer, output, 2, **SAME_STEP))
    ] == [0, 0]
    assert_losses_near(undisturbed, output)
    assert adapter_digest(output) == adapter_digest(undisturbed)


def test_sigusr1_saves_and_ends_all_and_killed_supervisors_lose_no_checkpoint(
    trainer: ForkingTrainer, undisturbed: Path
) -> None:
    output = trainer.root / "signalled"
    runs = start_processes(trainer, output, 2, **SAME_STEP)
    step = runs[0].wait_for(at_step(7))["step"]
    for run in runs:
        run.process.send_signal(signal.SIGUSR1)
    assert [one.code for one in end_processes(runs)] == [143, 143]
    assert steps_saved(output)[-1] >= step

    runs = start_processes(trainer, output, 2, **SAME_STEP)
    step = runs[0].wait_for(at_step(31))["step"]
    workers = [run.worker for run in runs]
    for run in runs:  # as torchrun does 30 s after it has asked them to stop
        os.kill(run.process.pid, signal.SIGKILL)
    end_processes(runs)
    wait_until_gone(workers)
    assert steps_saved(output)[-1] >= step
    assert [
        one.code for one in end_processes(start_processes(trainer, output, 2, **SAME_STEP))
    ] == [0, 0]
    assert_losses_near(undisturbed, output)
    assert adapter_digest(output) == adapter_digest(undisturbed)
