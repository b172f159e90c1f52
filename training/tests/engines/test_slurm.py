"""Jobs of deploy/slurm/train.sbatch under a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.slurm import Job, Slurm
from support.trainer import Trainer, adapter_digest, losses, of_kind

pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(900)]


def test_a_job_near_its_time_limit_saves_goes_back_into_the_queue_and_resumes(
    slurm: Slurm, trainer: Trainer, undisturbed: Path
) -> None:
    job = Job(slurm, trainer, trainer.root / "limit")
    job.wait_for_step(12)
    # What `--signal=B:USR1@120` sends.
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.go_on() == "COMPLETED"
    assert slurm.restarts(job.number) == 1
    assert len(of_kind(job.output, "run_started")) == 2
    assert adapter_digest(job.output) == adapter_digest(undisturbed)


def test_a_preempted_job_saves_goes_back_into_the_queue_and_resumes(
    slurm: Slurm, trainer: Trainer, undisturbed: Path
) -> None:
    job = Job(slurm, trainer, trainer.root / "preempted", "--exclusive")
    job.wait_for_step(7)
    whole = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    slurm.call("sbatch", "--parsable", *whole, "--wrap=sleep 1")
    assert job.go_on() == "COMPLETED"
    assert adapter_digest(job.output) == adapter_digest(undisturbed)
    # Nothing was computed twice: the checkpoint is of the step at which it was preempted.
    assert len(of_kind(job.output, "step")) == len(losses(job.output))


def test_a_cancelled_job_saves_and_stays_away_until_it_is_submitted_again(
    slurm: Slurm, trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "cancelled"
    job = Job(slurm, trainer, output)
    job.wait_for_step(9)
    slurm.call("scancel", job.number)
    assert job.end() == "CANCELLED"
    job.wait_until(lambda: of_kind(output, "ended"))
    assert of_kind(output, "ended")[-1]["exit_code"] == 143
    again = Job(slurm, trainer, output)
    assert again.end() == "COMPLETED", again.log.read_text()
    assert adapter_digest(output) == adapter_digest(undisturbed)


def test_an_error_that_no_retry_fixes_ends_the_job_with_its_exit_code(
    slurm: Slurm, trainer: Trainer
) -> None:
    job = Job(slurm, trainer, trainer.root / "wrong", learning_rate=-1)
    assert job.end() == "FAILED"
    assert slurm.exit_code(job.number) == 78
    assert slurm.restarts(job.number) == 0


def test_an_array_is_a_run_for_every_line_of_a_file(slurm: Slurm, trainer: Trainer) -> None:
    ranks = (2, 3, 5)
    sweep = trainer.root / "sweep.txt"
    sweep.write_text("".join(f"--lora_r {rank} --run_name r{rank}\n" for rank in ranks))
    output = trainer.root / "array"
    flags = ("--array=1-3", f"--export=ALL,SWEEP={sweep}")
    job = Job(slurm, trainer, output, *flags, max_steps=4, save_steps=4, eval_steps=4)
    configs = [output / f"r{rank}" / "final_model" / "adapter_config.json" for rank in ranks]
    job.wait_until(lambda: all(config.exists() for config in configs))
    assert [json.loads(config.read_text())["r"] for config in configs] == list(ranks)
