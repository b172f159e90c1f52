"""The comparison in CI: a tiny model, this project's loop against Trainer + PEFT, in one process.

Both train the same rows in turn, and both are judged against the reference. Compared is CPU time
of the steps on one thread: the median over repeats of the two runs' ratio, which other work on the
machine hardly moves. It must not fall under 0.8 of the recorded ratio.

    python bench/peers.py --quick --record      writes quick.json again
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_check.models import write_folder
from gpu_check.scale import Shape

from . import judge, ours, plain, trainers
from .job import Job, Record

RECORDED = Path(__file__).with_name("quick.json")
LEAST_SHARE = 0.8
SHAPE = Shape(256, 704, 3, 4, 2, 4096, True)
ROWS, LONGEST, RANK, REPEATS = 16, 256, 8, 3


def rows() -> list[dict[str, Any]]:
    """Return chat rows of very different lengths; a token is a byte."""
    draw = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz "

    def text(length: int) -> str:
        return "".join(draw.choices(letters, k=length))

    def row() -> dict[str, Any]:
        turns = {"user": text(12), "assistant": text(int(LONGEST ** draw.uniform(0.3, 0.9)))}
        return {"messages": [{"role": role, "content": words} for role, words in turns.items()]}

    return [row() for _ in range(ROWS)]


def compare() -> dict[str, float]:
    """Return the medians of both runs' CPU seconds, and of their ratio.

    Raises:
        AssertionError: one of them trained something else than the reference.
    """
    torch.set_num_threads(1)
    ratios, mine, theirs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder))
        reference: Record | None = None
        for repeat in range(REPEATS):
            output = Path(folder) / str(repeat)
            pair = (
                ours.train_here(job, output / "ours"),
                trainers.run(job, "trainer", output / "trainer.json"),
            )
            if reference is None:
                reference = plain.follow(job, pair[0].step_rows, Path(folder) / "plain.json")
            for name, record in zip(("lora-trainer", "trainer"), pair, strict=True):
                judge.same_training(name, job, record, reference)
            mine.append(pair[0].cpu_seconds)
            theirs.append(pair[1].cpu_seconds)
            ratios.append(theirs[-1] / mine[-1])
    return {
        "ratio": statistics.median(ratios),
        "ours_cpu_seconds": statistics.median(mine),
        "trainer_cpu_seconds": statistics.median(theirs),
    }


def is_slower(measured: dict[str, float], recorded: dict[str, float]) -> bool:
    """Return whether the ratio fell under what is allowed."""
    return measured["ratio"] < LEAST_SHARE * recorded["ratio"]


def main(*, is_recording: bool) -> int:
    """Compare; print the figures; return 1 if the lead shrank."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    measured = compare()
    if is_recording:
        RECORDED.write_text(json.dumps(measured, indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    print(
        f"CPU time of Trainer + PEFT: {measured['ratio']:.2f} times this project's "
        f"(recorded: {recorded['ratio']:.2f}; at least {LEAST_SHARE} of it is required)"
    )
    return int(is_slower(measured, recorded))


def _job(folder: Path) -> Job:
    model = write_folder(folder / "model", SHAPE, device="cpu", dtype=torch.float32)
    job = Job("quick", str(folder / "job"), str(model), RANK, max_length=LONGEST)
    ours.prepare(job, rows())
    return job
