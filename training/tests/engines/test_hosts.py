"""Two hosts of two processes: the run of one process, whatever happens to cable and hosts."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.hosts import Hosts, two_hosts
from support.trainer import Run, Trainer, adapter_of, at_step, losses, of_kind

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
JOB = {
    "train_batch_size": 4,
    "per_device_train_batch_size": 1,
    "max_steps": 40,
    "eval_steps": 0,
    "load_best_model_at_end": False,
}
CHANCE = random.Random(14)
STEP = 12  # of the disturbances; every fifth step is saved


@pytest.fixture(scope="module")
def alone(trainer: Trainer) -> Path:
    """Return the folder of the run that one process has trained."""
    return trainer.finish(trainer.root / "alone", **JOB)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as pair:
        yield pair


def start(hosts: Hosts, trainer: Trainer, name: str) -> list[Run]:
    return [hosts.start(trainer, trainer.root / name, host, **JOB) for host in range(2)]


def assert_same(output: Path, alone: Path) -> None:
    """Assert equal losses, once for each step, and an equal adapter; sums have another order."""
    own, reference = losses(output), losses(alone)
    assert own.keys() == reference.keys()
    for step, values in own.items():
        (expected,) = reference[step]
        assert list(values) == pytest.approx([expected] * len(values), rel=1e-4)
    adapter = adapter_of(alone)
    for name, tensor in adapter_of(output).items():
        np.testing.assert_allclose(tensor, adapter[name], atol=1e-5)


def assert_trained(runs: list[Run], alone: Path, *, is_resumed: bool = False) -> None:
    """Assert that both hosts end well, with the run of one process."""
    ended = [run.wait() for run in runs]
    assert [one.code for one in ended] == [0, 0], ended
    assert bool(of_kind(runs[0].output, "resumed")) is is_resumed
    assert_same(runs[0].output, alone)


def test_two_hosts_train_what_one_process_does(hosts: Hosts, trainer: Trainer, alone: Path) -> None:
    assert_trained(start(hosts, trainer, "undisturbed-hosts"), alone)


def test_a_cable_that_is_slow_and_loses_packets_changes_nothing(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "slow")
    runs[0].wait_for(at_step(STEP))
    hosts.slow("2mbit")
    assert_trained(runs, alone)


def test_a_cable_that_is_out_for_a_moment_ends_nothing(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "moment")
    runs[0].wait_for(at_step(STEP))
    hosts.cut()
    time.sleep(1.5)
    hosts.mend()
    assert_trained(runs, alone)


def test_a_cable_that_is_out_for_a_minute_restarts_the_run(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "minute")
    runs[0].wait_for(at_step(STEP))
    hosts.cut()
    time.sleep(60)
    hosts.mend()
    assert_trained(runs, alone, is_resumed=True)


def test_a_host_that_dies_and_comes_back_resumes_the_run(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    output = trainer.root / "second-dies"
    runs = start(hosts, trainer, "second-dies")
    runs[0].wait_for(at_step(CHANCE.randrange(6, 30)))
    runs[1].kill()
    runs[1] = hosts.start(trainer, output, 1, **JOB)
    assert_trained(runs, alone, is_resumed=True)
    assert "rank 2 on host1" in str(of_kind(output, "failed"))


def test_without_the_first_host_the_others_end_and_the_same_commands_resume(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "first-dies")
    runs[0].wait_for(at_step(CHANCE.randrange(6, 30)))
    runs[0].kill()
    other = runs[1].wait()
    assert other.code not in (0, 65, 78), other
    assert_trained(start(hosts, trainer, "first-dies"), alone, is_resumed=True)
