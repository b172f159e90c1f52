"""Whole training runs through the command line: the same bytes twice, and after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import criteria
from .precision import settings_of, write_model
from .record import Figures, Record
from .scale import Scale

STEPS, SAVE_STEPS, KILLED_AFTER = 20, 5, 6
SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass(frozen=True, slots=True)
class Run:
    """A training run that was started."""

    output: Path
    process: subprocess.Popen[bytes]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the recorded events of a kind."""
        events = []
        with contextlib.suppress(OSError):
            for line in (self.output / "events.jsonl").read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # the last line may be half written
                    events.append(json.loads(line))
        return [event for event in events if event["event"] == kind]

    def kill_worker(self) -> int:
        """Kill the training process after a step; return the step."""
        while self.process.poll() is None:
            steps = [event["step"] for event in self.events("step")]
            if steps and steps[-1] >= KILLED_AFTER:
                for pid in self._workers():
                    os.kill(pid, signal.SIGKILL)
                return int(steps[-1])
            time.sleep(0.005)
        raise RuntimeError(f"the run ended with {self.process.returncode} before its step")

    def _workers(self) -> list[int]:
        """Return the supervisor's children that train."""
        supervisor = self.process.pid
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return [pid for pid, command in commands.items() if b"worker" in command]

    def digest(self) -> str:
        """Wait for the end; return the sha256 of the adapter."""
        code = self.process.wait()
        if code:
            raise RuntimeError(f"{self.output.name} ended with {code}, see the section's log")
        weights = self.output / "final_model" / "adapter_model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest()


def run(record: Record, scale: Scale) -> None:
    """Train side by side, kill one of the runs, and compare what they export."""
    # On a CPU the tests of resuming train twice; it is spared the time here.
    names = ("first", "second", "killed") if scale.has_gpu else ("first", "killed")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        root = Path(folder)
        write_model(root, scale)
        runs = {name: _start(root, name) for name in names}
        for one in runs.values():
            started.callback(one.process.kill)
        first, killed = runs["first"], runs["killed"]
        resumed_digest = ""
        with record.attempt("kill -9 and resume"):
            step = killed.kill_worker()
            resumed_digest = killed.digest()
        with record.attempt("20 steps twice"):
            digests = [one.digest() for name, one in runs.items() if name != "killed"]
            figures: Figures = {"adapter": digests[0][:16]} | _notes(first)
            if len(digests) > 1:
                record.judge("20 steps twice", figures, criteria.same_bytes(digests))
            else:
                record.measure("20 steps", figures)
            if not resumed_digest:
                return
            steps = [event["step"] for event in killed.events("resumed")]
            figures = {
                "killed after step": step,
                "resumed from": steps[0] if steps else "nothing",
                "adapter": resumed_digest[:16],
            }
            verdict = criteria.same_bytes([digests[0], resumed_digest])
            record.judge("kill -9 and resume", figures, verdict)


def _notes(first: Run) -> Figures:
    plan = json.loads((first.output / "plan.json").read_text())
    varying = [reason for reason in plan["reasons"] if "deterministic" in reason]
    return {"precision": plan["precision"], "without a deterministic implementation": len(varying)}


def _start(root: Path, name: str) -> Run:
    config = root / f"{name}.json"
    keys = settings_of(
        root,
        name,
        eval_dataset=None,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        lora_dropout=0.1,
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        dataset_cache_dir=str(root / f"cache-{name}"),
    )
    config.write_text(json.dumps(keys))
    command = [sys.executable, "-m", "lora_trainer", "train", "--config", str(config)]
    # After the package come the folders that this process was given, as where wheels were unpacked.
    folders = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    return Run(root / name, process)
