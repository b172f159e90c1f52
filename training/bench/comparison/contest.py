"""The contest: every contestant in a fresh process, in turn, judged against the reference."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import judge, ours
from .job import IGNORED, KINDS, Job, Record

BENCH = Path(__file__).resolve().parents[1]
OURS = "lora-trainer"
IMPORTS = "import torch, transformers, peft; from transformers import AutoModelForCausalLM"


@dataclass(frozen=True)
class Contest:
    """One job, the contestants, and where they run."""

    job: Job
    peers: Path  # the Python of the peers' environment
    folder: Path  # for what they write
    out: Path  # for the results
    contestants: tuple[str, ...] = (OURS, *KINDS)

    def run(self, repeats: int) -> dict[str, list[dict[str, float]]]:
        """Run everybody `repeats` times in turn; return the figures of each repeat.

        Raises:
            AssertionError: a contestant trained something else than the reference did.
        """
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in self.contestants}
        for repeat in range(repeats):
            turn = repeat % len(self.contestants)
            for name in (*self.contestants[turn:], *self.contestants[:turn]):
                spawned = time.time()
                record = self._train(name, self.folder / f"{self.job.name}-{name}-{repeat}")
                judge.same_training(name, self.job, record, self.reference(record.step_rows))
                figures[name].append(self._figures(record, spawned))
                kept = json.dumps(figures, indent=1)  # of a comparison that is cut off
                (self.out / f"{self.job.name}-so-far.json").write_text(kept)
                speed = figures[name][-1]["tokens_per_second"]
                print(f"{self.job.name} {repeat + 1}: {name} {speed:.0f} tokens/s", flush=True)
        return figures

    def reference(self, steps: list[list[int]]) -> Record:
        """Return what the reference did with these rows in these steps; computed once."""
        inputs = [self.job.tokens, *sorted(self.job.adapter.glob("*.safetensors"))]
        digest = hashlib.sha256(json.dumps([steps, self.job.learning_rate]).encode())
        for path in inputs:
            digest.update(path.read_bytes())
        out = Path(self.job.folder) / f"reference-{digest.hexdigest()[:12]}.json"
        if not out.exists():
            schedule = out.with_suffix(".steps.json")
            schedule.write_text(json.dumps(steps))
            run([self.peers, "-m", "comparison.plain", self._job, schedule, out])
        return Record.read(out)

    @property
    def _job(self) -> Path:
        return Path(self.job.folder) / "job.json"

    def _train(self, name: str, output: Path) -> Record:
        if name == OURS:
            run(ours.command(self.job, output))
            return ours.record_of(self.job, output)
        out = output.with_suffix(".json")
        run([self.peers, "-m", "comparison.trainers", self._job, name, out])
        return Record.read(out)

    def _figures(self, record: Record, spawned: float) -> dict[str, float]:
        examples = self.job.examples()
        rows = [examples[row] for step in record.step_rows for row in step]
        tokens = sum(len(row["input_ids"]) for row in rows)
        supervised = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        loaded = self.reference(record.step_rows).loaded_bytes
        return {
            "tokens_per_second": tokens / record.seconds,
            "supervised_tokens_per_second": supervised / record.seconds,
            "step_seconds": record.seconds / len(record.ends),
            "seconds_to_first_step": record.begin[0] - spawned,
            "peak_bytes": record.peak_bytes,
            "above_loaded_bytes": record.peak_bytes - loaded,
            "largest_batch_tokens": record.largest_batch_tokens,
        }


def seconds_to_import(python: Path, repeats: int) -> list[float]:
    """Return how long a process takes that only imports what every trainer needs."""
    taken = []
    for _ in range(repeats):
        start = time.monotonic()
        run([python, "-c", IMPORTS])
        taken.append(time.monotonic() - start)
    return taken


def run(command: list[Any], **environment: str) -> str:
    """Run a process to its end; return what it printed.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    folders = [BENCH, *([BENCH.parent / "src"] if str(command[0]) == sys.executable else [])]
    path = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | offline | path | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(
            f"{words} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout
