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
from support.trainer import Ended, Run, Trainer, adapter_of, at_step, losses, of_kind

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
    output = trainer.root / "alone"
    ended = trainer.train(output, **JOB)
    assert ended.code == 0, ended.err
    return output


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as pair:
        yield pair


def start(hosts: Hosts, trainer: Trainer, name: str) -> list[Run]:
    return [hosts.start(trainer, trainer.root / name, host, **JOB) for host in range(2)]


def end(runs: list[Run]) -> list[Ended]:
    return [run.wait() for run in runs]


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


def test_two_hosts_train_what_one_process_does(hosts: Hosts, trainer: Trainer, alone: Path) -> None:
    ended = end(start(hosts, trainer, "undisturbed-hosts"))
    assert [one.code for one in ended] == [0, 0], ended
    assert not of_kind(trainer.root / "undisturbed-hosts", "resumed")
    assert_same(trainer.root / "undisturbed-hosts", alone)


def test_a_cable_that_is_slow_and_loses_packets_changes_nothing(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "slow")
    runs[0].wait_for(at_step(STEP))
    hosts.slow("2mbit")
    ended = end(runs)
    assert [one.code for one in ended] == [0, 0], ended
    assert not of_kind(trainer.root / "slow", "resumed")
    assert_same(trainer.root / "slow", alone)


def test_a_cable_that_is_out_for_a_moment_ends_nothing(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "moment")
    runs[0].wait_for(at_step(STEP))
    hosts.cut()
    time.sleep(1.5)
    hosts.mend()
    ended = end(runs)
    assert [one.code for one in ended] == [0, 0], ended
    assert not of_kind(trainer.root / "moment", "resumed")
    assert_same(trainer.root / "moment", alone)


def test_a_cable_that_is_out_for_a_minute_restarts_the_run(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    runs = start(hosts, trainer, "minute")
    runs[0].wait_for(at_step(STEP))
    hosts.cut()
    time.sleep(60)
    hosts.mend()
    ended = end(runs)
    assert [one.code for one in ended] == [0, 0], ended
    assert of_kind(trainer.root / "minute", "resumed")
    assert_same(trainer.root / "minute", alone)


def test_a_host_that_dies_and_comes_back_resumes_the_run(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    output = trainer.root / "second-dies"
    runs = start(hosts, trainer, "second-dies")
    runs[0].wait_for(at_step(CHANCE.randrange(6, 30)))
    runs[1].kill()
    runs[1] = hosts.start(trainer, output, 1, **JOB)
    ended = end(runs)
    assert [one.code for one in ended] == [0, 0], ended
    assert of_kind(output, "resumed")
    assert "rank 2 on host1" in str(of_kind(output, "failed"))
    assert_same(output, alone)


def test_without_the_first_host_the_others_end_and_the_same_commands_resume(
    hosts: Hosts, trainer: Trainer, alone: Path
) -> None:
    output = trainer.root / "first-dies"
    runs = start(hosts, trainer, "first-dies")
    runs[0].wait_for(at_step(CHANCE.randrange(6, 30)))
    runs[0].kill()
    other = runs[1].wait()
    assert other.code not in (0, 65, 78), other
    ended = end(start(hosts, trainer, "first-dies"))
    assert [one.code for one in ended] == [0, 0], ended
    assert of_kind(output, "resumed")
    assert_same(output, alone)
