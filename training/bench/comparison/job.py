"""What every contestant trains, and what each one reports.

Imports neither torch nor the trainer: the peers' environment has only this folder of the project.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

IGNORED = -100  # the label of a token that is not supervised
GRADIENT_NORM = 1.0
KINDS = ("trainer", "trl-padded", "trl-packed")  # the peers


@dataclass(frozen=True)
class Job:
    """A model, rows and hyperparameters; its folder holds the tokens and the first adapter."""

    name: str
    folder: str
    model: str
    rank: int = 16
    step_rows: int = 8
    max_length: int = 512
    learning_rate: float = 1e-3

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read a job."""
        return cls(**json.loads(path.read_text()))

    def write(self) -> Path:
        """Write it into its folder; return the file."""
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @property
    def rows(self) -> Path:
        """Return the file of chat rows."""
        return Path(self.folder) / "rows.jsonl"

    @property
    def tokens(self) -> Path:
        """Return the file of token ids and labels, in the order of training."""
        return Path(self.folder) / "tokens.jsonl"

    @property
    def adapter(self) -> Path:
        """Return the folder of the adapter that every contestant starts from."""
        return Path(self.folder) / "adapter"

    def examples(self) -> list[dict[str, list[int]]]:
        """Return `input_ids` and `labels` of each row, in the order of training."""
        return [json.loads(line) for line in self.tokens.read_text().splitlines()]


@dataclass
class Record:
    """What a contestant did: for each step its rows, loss, gradient norm, and when it ended.

    Units: `begin` and `ends` are seconds since the epoch and of CPU time; memory in bytes.
    """

    step_rows: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    begin: list[float] = field(default_factory=list)
    ends: list[list[float]] = field(default_factory=list)
    loaded_bytes: int = 0
    peak_bytes: int = 0
    largest_batch_tokens: int = 0  # of a micro-batch, padding included
    adapter: str = ""

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(asdict(self)))

    @property
    def seconds(self) -> float:
        """Return the time from the begin of the first step to the end of the last."""
        return self.ends[-1][0] - self.begin[0]

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU time of the steps."""
        return self.ends[-1][1] - self.begin[1]


def clocks() -> list[float]:
    """Return the time and this process's CPU time."""
    return [time.time(), time.process_time()]


def memory(name: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def reset_peak() -> int:
    """Let the peak of this process start over; return what it holds now, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: give back what is free
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def row_numbers(examples: list[dict[str, Any]]) -> dict[tuple[int, ...], int]:
    """Return each row's number by its tokens."""
    return {tuple(one["input_ids"]): number for number, one in enumerate(examples)}
