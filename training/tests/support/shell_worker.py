"""A supervisor whose worker is a shell script: a run in a tenth of a second, without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_trainer.config.settings import resolve
from lora_trainer.run.events import StepDone
from lora_trainer.supervise.supervisor import Supervisor


def step_line(step: int, loss: float = 1.0) -> str:
    return StepDone(
        step=step,
        epoch=0.0,
        loss=loss,
        learning_rate=0.1,
        grad_norm=1.0,
        step_seconds=0.1,
        tokens=1,
        trained_tokens=1,
        tokens_seen=step,
        memory_bytes=1,
    ).to_line()


def says(*events: str) -> str:
    """Return shell commands that say events as a worker does."""
    return "".join(f"echo '{line.strip()}' >/dev/fd/$LORA_TRAINER_EVENTS_FD\n" for line in events)


def play(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have a shell script be the worker; $N in it is how many workers there were before."""
    worker = folder / "worker"
    counted = f"N=$(cat {folder}/count 2>/dev/null || echo 0); echo $((N + 1)) > {folder}/count"
    worker.write_text(f"#!/bin/sh\ncat > {folder}/order\n{counted}\n{script}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))


def supervisor_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str
) -> Supervisor:
    """Return the supervisor of a run in `folder/out` whose worker is a shell script."""
    play(folder, monkeypatch, script)
    given = ["--output_dir", str(folder / "out"), "--health_port", "0", *arguments]
    return Supervisor(resolve(None, {}, given), lambda *_: None)
