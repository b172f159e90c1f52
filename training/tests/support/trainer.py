"""Starts the real command line on the tiny model, watches its events, and kills it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from support.tiny_model import write_model, write_rows

SOURCE = Path(__file__).resolve().parents[2] / "src"
STEPS, SAVE_STEPS, EVAL_STEPS = 60, 5, 11
SECONDS = 300.0
# What a command needs of the machine: where its programs, GPUs and their libraries are.
KEPT_VARIABLES = (
    "PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "CUDA_HOME",
)  # fmt: skip
WORKER = "forked-worker"  # the name of a worker that a fork has made; others have a command
Event = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def block(self) -> str:
        """Return the last block of standard error."""
        return self.err.rstrip().rsplit("\n\n", 1)[-1]


class Trainer:
    """A place with a model, data and a config, where the command line is run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = write_model(root / "model")
        self.rows = write_rows(root / "train.jsonl", 0, 64)
        self.held_out = write_rows(root / "held-out.jsonl", 900, 40)
        self.settings: dict[str, Any] = {
            "model_name_or_path": str(self.model),
            "dataset": str(self.rows),
            "eval_dataset": str(self.held_out),
            "preprocessing_num_workers": 1,
            "max_seq_length": 128,
            "lora_r": 4,
            "lora_dropout": 0.1,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "eval_steps": EVAL_STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "learning_rate": 0.01,
            "bf16": False,
            "report_to": [],
            "health_port": 0,
        }

    def environment(self) -> dict[str, str]:
        """Return a clean environment: no network, one thread, a cache of its own."""
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return kept | {
            "HOME": str(self.root),
            "HF_HOME": str(self.root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(SOURCE), *_given_folders()]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def command(self, output: Path, **changed: Any) -> list[str]:
        """Write a config beside the output folder; return the command that trains with it."""
        config = self.root / f"{output.name}.json"
        config.write_text(json.dumps(self.settings | {"output_dir": str(output)} | changed))
        return [sys.executable, "-m", "lora_trainer", "train", "--config", str(config)]

    def start(self, output: Path, *options: str, **changed: Any) -> Run:
        """Start training."""
        command = [*self.command(output, **changed), *options]
        return Run(command, output, self.environment())

    def train(self, output: Path, *options: str, **changed: Any) -> Ended:
        """Train to the end."""
        return self.start(output, *options, **changed).wait()

    def finish(self, output: Path, **changed: Any) -> Path:
        """Train to the end, which must be a good one; return the output folder."""
        ended = self.train(output, **changed)
        assert ended.code == 0, ended.err
        return output

    def call(self, *arguments: str, **environment: str) -> Ended:
        """Run another command of the command line."""
        done = subprocess.run(
            [sys.executable, "-m", "lora_trainer", *arguments],
            check=False,
            env=self.environment() | environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return Ended(done.returncode, done.stdout, done.stderr)


def _given_folders() -> list[str]:
    """Return where else this process looks for packages, such as unpacked wheels."""
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


class Run:
    """A training command that is running."""

    def __init__(
        self,
        command: list[str],
        output: Path,
        environment: dict[str, str],
        process: Any = None,
    ) -> None:
        self.output = output
        self.began = time.time()
        self.process = process or subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self) -> Ended:
        """Wait for the end."""
        try:
            out, err = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Ended(self.process.returncode, out, err)

    def wait_for(self, is_it: Callable[[Event], bool]) -> Event:
        """Wait for an event of this start; the run must not end before."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            has_ended = self.process.poll() is not None
            for event in events_of(self.output):
                if event["time"] >= self.began and is_it(event):
                    return event
            if has_ended:
                raise AssertionError(f"ended before it happened: {self.wait()}")
            time.sleep(0.002)
        self.kill()
        raise AssertionError("it did not happen")

    @property
    def worker(self) -> int:
        """Return the worker's process id."""
        return self.ranks()[0]

    def ranks(self) -> list[int]:
        """Return the process ids of all workers, in order of rank."""
        return [pid for pid in self.family() if _is_worker(pid)]

    def family(self) -> list[int]:
        """Return the supervisor's process id and those of all its descendants."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                pids += [int(child) for child in listed.split()]
        return pids

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no process of the run go on meanwhile."""
        family = self.family()

        def send(number: int) -> None:
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        send(signal.SIGSTOP)
        try:
            yield
        finally:
            send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill every process of the run at once, as a power cut does."""
        family = self.family()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        wait_until_gone(family)


def wait_until_gone(pids: list[int]) -> None:
    """Wait until no process has one of these ids any more (a zombie has none of its files)."""
    until = time.monotonic() + 10
    while time.monotonic() < until and any(_is_running(pid) for pid in pids):
        time.sleep(0.005)


def _is_worker(pid: int) -> bool:
    try:
        command, name = (Path(f"/proc/{pid}/{file}").read_text() for file in ("cmdline", "comm"))
    except OSError:
        return False
    return "lora_trainer.train.worker" in command or name.strip() == WORKER


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def events_of(output: Path) -> list[Event]:
    """Return the whole events recorded so far."""
    try:
        lines = (output / "events.jsonl").read_text(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    objects = []
    for line in lines:
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line))
    return [event for event in objects if isinstance(event, dict)]


def of_kind(output: Path, kind: str) -> list[Event]:
    """Return the recorded events of a kind."""
    return [event for event in events_of(output) if event["event"] == kind]


def losses(output: Path) -> dict[int, set[float]]:
    """Return every loss recorded for each step: one, where resuming changes nothing."""
    by_step: dict[int, set[float]] = {}
    for event in of_kind(output, "step"):
        by_step.setdefault(event["step"], set()).add(event["loss"])
    return by_step


def adapter_digest(output: Path) -> str:
    """Return the sha256 of the exported adapter."""
    return hashlib.sha256(
        (output / "final_model" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def adapter_of(output: Path) -> dict[str, Any]:
    """Return the exported adapter's tensors, as arrays by name."""
    return load_file(output / "final_model" / "adapter_model.safetensors")


def steps_saved(output: Path) -> list[int]:
    """Return the steps of the checkpoints on disk."""
    names = (path.name for path in (output / "checkpoints").glob("step-*"))
    return sorted(int(name.removeprefix("step-")) for name in names)


def at_step(step: int) -> Callable[[Event], bool]:
    """Return whether an event is that step, done."""
    return lambda event: event["event"] == "step" and event["step"] >= step


def at_phase(phase: str, step: int = 0) -> Callable[[Event], bool]:
    """Return whether an event begins that phase, at or after a step."""

    def is_it(event: Event) -> bool:
        if event["event"] != "phase" or event["phase"] != phase:
            return False
        number = event["detail"].removeprefix("step ")
        return not step or (number.isdigit() and int(number) >= step)

    return is_it
