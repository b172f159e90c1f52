"""deploy/ray/train.py on a real Ray cluster of two nodes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.checkout import TRAINING
from support.ray_cluster import Cluster, running
from support.trainer import Run, Trainer, adapter_of, at_step, of_kind, steps_saved

pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(
    trainer: Trainer,
    python_with: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    python = python_with("ray")
    with running(tmp_path_factory.mktemp("ray"), python, trainer.environment()) as cluster:
        yield cluster


def driver(cluster: Cluster, trainer: Trainer, output: Path, **changed: object) -> list[str]:
    """Return the script as a command, with the step of one process."""
    command = trainer.command(output, **{"gradient_accumulation_steps": 1} | changed)
    script = [str(cluster.python), str(TRAINING / "deploy" / "ray" / "train.py")]
    script += ["--workers", "2", "--cpus", "1", "--memory", "2000000000", "--"]
    return [*script, *command[command.index("--config") :]]


def submit(cluster: Cluster, trainer: Trainer, output: Path, **changed: object) -> Run:
    """Start the script as a driver of the cluster."""
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    return Run(driver(cluster, trainer, output, **changed), output, environment)


def assert_same_adapter(output: Path, undisturbed: Path) -> None:
    expected = adapter_of(undisturbed)
    for name, tensor in adapter_of(output).items():
        assert abs(tensor - expected[name]).max() < 1e-5, name


def test_a_run_on_two_nodes_survives_the_loss_of_one(
    cluster: Cluster, trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "lost-node"
    run = submit(cluster, trainer, output)
    run.wait_for(at_step(17))
    cluster.kill_node(1)
    cluster.add_node()
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert len(of_kind(output, "run_started")) == 2
    assert_same_adapter(output, undisturbed)


def test_a_driver_that_is_stopped_leaves_a_checkpoint_to_resume_from(
    cluster: Cluster, trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "stopped"
    run = submit(cluster, trainer, output)
    step = int(run.wait_for(at_step(12))["step"])
    run.process.send_signal(signal.SIGTERM)
    run.wait()
    wait_for_end(output)
    assert steps_saved(output)[-1] >= step
    again = submit(cluster, trainer, output).wait()
    assert again.code == 0, again.err
    assert_same_adapter(output, undisturbed)


def test_a_job_that_ray_stops_leaves_a_checkpoint_from_which_the_next_resumes(
    cluster: Cluster, trainer: Trainer
) -> None:
    output = trainer.root / "job"
    endless = driver(cluster, trainer, output, max_steps=100_000)
    cluster.job("submit", "--no-wait", "--submission-id", "first", "--", *endless)
    wait_until(lambda: len(of_kind(output, "step")) > 12)
    wait_until(lambda: "loss" in cluster.job("logs", "first"))
    step = of_kind(output, "step")[-1]["step"]
    cluster.job("stop", "first")
    wait_for_end(output)
    assert steps_saved(output)[-1] >= step
    cluster.job("submit", "--no-wait", "--submission-id", "second", "--", *endless)
    wait_until(lambda: of_kind(output, "resumed"))
    assert of_kind(output, "resumed")[-1]["step"] >= step
    cluster.job("stop", "second")
    wait_until(lambda: len(of_kind(output, "ended")) > 1)


def test_the_exit_code_of_an_error_is_that_of_the_driver(
    cluster: Cluster, trainer: Trainer
) -> None:
    ended = submit(cluster, trainer, trainer.root / "wrong", learning_rate=-1).wait()
    assert ended.code == 78, ended.err


def wait_for_end(output: Path) -> None:
    """Wait until the run has recorded its end."""
    wait_until(lambda: of_kind(output, "ended"))


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)
