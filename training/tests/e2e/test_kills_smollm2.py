"""Three kills of the real command on the embedded model: the same losses and the same bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.trainer import Run, adapter_digest, at_phase, at_step, losses, of_kind

TRAINING = Path(__file__).resolve().parents[2]
KEYS = ["--max_steps=6", "--save_steps=2", "--eval_steps=0", "--eval_generate=false"]
KEYS += ["--max_seq_length=128", "--per_device_train_batch_size=2", "--report_to=[]"]
KEYS += ["--gradient_accumulation_steps=1", "--health_port=0"]
# The same bytes after a kill are each stack's own matter, and in test_resume.py.
pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(1200)]


def start(output: Path) -> Run:
    entry, config = str(TRAINING / "train_lora.py"), str(TRAINING / "config.json")
    command = [sys.executable, entry, "--config", config, "--output_dir", str(output), *KEYS]
    return Run(command, output, dict(os.environ))


def test_three_kills_change_neither_the_losses_nor_the_bytes(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ended = start(undisturbed).wait()
    assert ended.code == 0, ended.err
    for instant in (at_step(1), at_phase("saving", 4), at_phase("exporting")):
        run = start(killed)
        run.wait_for(instant)
        run.kill()
    ended = start(killed).wait()
    assert ended.code == 0, ended.err
    assert of_kind(killed, "resumed")
    assert losses(killed) == losses(undisturbed)
    assert adapter_digest(killed) == adapter_digest(undisturbed)
