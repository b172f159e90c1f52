"""The real torchrun starts a run, restarts it when a rank is killed, and may be killed itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.launched import free_port
from support.trainer import (
    SOURCE,
    Run,
    Trainer,
    adapter_digest,
    at_step,
    events_of,
    losses,
    of_kind,
    steps_saved,
    wait_until_gone,
)

pytestmark = pytest.mark.any_stack  # torch 2.1 is refused: tests/quick/host/test_launcher.py

SHORT = {
    "max_steps": 16,
    "train_batch_size": 4,  # with any number of processes
    "save_steps": 3,
    "eval_steps": 0,
    "eval_dataset": None,
    "load_best_model_at_end": False,
}
ENDLESS = {"max_steps": 100_000}  # a fast machine must not finish before it has been stopped
CHANCE = random.Random(26)


@pytest.fixture(scope="module")
def alone(command_line: Trainer) -> Path:
    """Return the folder of the run that one process has trained."""
    return command_line.finish(command_line.root / "alone", **SHORT)


def torchrun(trainer: Trainer, output: Path, *options: str, **changed: object) -> Run:
    """Start a run of two processes by torchrun."""
    arguments = trainer.command(output, **SHORT | changed)[4:]
    script = str(SOURCE.parent / "train_lora.py")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    agent += ["--nproc-per-node", "2", "--monitor-interval", "0.2", *options, script]
    return Run([*agent, *arguments], output, trainer.environment())


def nodes(trainer: Trainer, output: Path, **changed: object) -> list[Run]:
    """Start a run of two nodes of one process each by `--nnodes`."""
    own = ("--nnodes", "2", "--nproc_per_node", "1")
    own += ("--rdzv_endpoint", f"127.0.0.1:{free_port()}")
    return [
        trainer.start(output, *own, "--node_rank", str(node), **SHORT | changed)
        for node in range(2)
    ]


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_ends_with_the_bytes_of_one(
    command_line: Trainer, alone: Path
) -> None:
    output = command_line.root / "restarted"
    run = torchrun(command_line, output, "--max-restarts", "1")
    run.wait_for(at_step(CHANCE.randrange(4, 12)))
    os.kill(run.ranks()[1], signal.SIGKILL)
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert len(of_kind(output, "run_started")) == 2
    assert of_kind(output, "resumed")
    assert losses(output) == losses(alone)
    assert adapter_digest(output) == adapter_digest(alone)


def test_killed_torchrun_leaves_a_checkpoint(command_line: Trainer) -> None:
    output = command_line.root / "launcher-killed"
    run = torchrun(command_line, output, **ENDLESS)
    step = run.wait_for(at_step(CHANCE.randrange(4, 12)))["step"]
    family = run.family()
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.communicate()
    wait_until_gone(family)
    until = time.monotonic() + 30
    while not of_kind(output, "ended") and time.monotonic() < until:
        time.sleep(0.1)
    assert events_of(output)[-1]["exit_code"] == 143
    assert steps_saved(output)[-1] >= step


def test_a_config_error_under_torchrun_is_printed_once(command_line: Trainer) -> None:
    ended = torchrun(command_line, command_line.root / "wrong", learning_rate=-1).wait()
    assert ended.code == 1  # torchrun's own
    assert ended.err.count("exit code 78 (configuration)") == 1
    assert "exitcode  : 78" in ended.err


def test_nodes_restart_a_run_that_lost_a_worker_and_a_supervisor_and_it_ends_with_the_bytes_of_one(
    command_line: Trainer, alone: Path
) -> None:
    output = command_line.root / "nodes-restarted"
    first, other = nodes(command_line, output)
    first.wait_for(at_step(CHANCE.randrange(2, 5)))
    os.kill(other.worker, signal.SIGKILL)
    first.wait_for(at_step(CHANCE.randrange(8, 12)))
    os.kill(psutil.Process(other.worker).ppid(), signal.SIGKILL)
    ended = [one.wait() for one in (first, other)]
    assert [one.code for one in ended] == [0, 0], ended
    assert len(of_kind(output, "run_started")) == 3
    assert losses(output) == losses(alone)
    assert adapter_digest(output) == adapter_digest(alone)


def test_nodes_of_one_command_stop_together_with_the_runs_exit_code_and_a_checkpoint(
    command_line: Trainer,
) -> None:
    output = command_line.root / "nodes"
    first, other = nodes(command_line, output, **ENDLESS)
    step = first.wait_for(at_step(4))["step"]
    first.process.send_signal(signal.SIGTERM)
    ended = [one.wait() for one in (first, other)]
    assert [one.code for one in ended] == [143, 143]
    # A line of the agent may follow, a traceback of it not.
    assert "exit code 143 (stopped by signal)" in ended[0].err
    assert "Traceback" not in ended[0].err
    assert steps_saved(output)[-1] >= step


def test_several_nodes_without_an_address_are_a_config_error(command_line: Trainer) -> None:
    output = command_line.root / "no-address"
    command = [*command_line.command(output), "--nnodes", "2"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=command_line.environment()
    )
    assert done.returncode == 78
    assert "--rdzv_endpoint HOST:29500" in done.stderr
