"""Starts the processes of a run as a launcher does."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.trainer import Ended, Run
from support.zygote import ForkingTrainer


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_processes(trainer: ForkingTrainer, output: Path, count: int, **changed: Any) -> list[Run]:
    """Start `count` processes of one host, rank by rank."""
    port = free_port()
    runs = []
    for rank in range(count):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {name: str(value) for name, value in variables.items()}
        runs.append(trainer.start_in({"environment": environment}, output, **changed))
    return runs


def end_processes(runs: Sequence[Run]) -> list[Ended]:
    """Wait for all of them."""
    return [run.wait() for run in runs]
