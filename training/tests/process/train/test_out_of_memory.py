"""Memory that runs out in a real process: refused by the kernel, or ended by its OOM killer."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.trainer import Run, Trainer, at_phase, losses, of_kind, wait_until_gone

BATCH, BUDGET, STEPS = 128, 128 * 256, 3
# Beyond the loaded model, a step of half as many rows needs less than this, and of all more.
TOO_LITTLE = 90 << 20
CGROUP = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def wide(trainer: Trainer) -> dict[str, Any]:
    """Return settings whose steps need some hundred megabytes more than what is loaded."""
    path = trainer.root / "long-rows.jsonl"
    rows = [
        {"prompt": f"Number {number}: ", "completion": f"{number} is " + "very long, " * 18}
        for number in range(BATCH)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "dataset": str(path),
        "max_seq_length": 256,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_tokens_per_micro_batch": BUDGET,
        "max_steps": STEPS,
        "eval_steps": 0,
        "save_steps": 2,
        "load_best_model_at_end": False,
    }


def address_space(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmSize:")[1].split()[0]) * 1024


def assert_smaller(output: Path) -> None:
    """Assert that the run went on with smaller micro-batches, and says and keeps that."""
    reduced = [event["micro_batch_tokens"] for event in of_kind(output, "memory")]
    assert reduced
    assert reduced[0] == BUDGET // 2
    kept = json.loads((output / "memory.json").read_text())
    assert kept["micro_batch_tokens"] == reduced[-1]
    assert any("out of memory" in event["message"] for event in of_kind(output, "warning"))
    assert losses(output).keys() == set(range(1, STEPS + 1))


def test_limit_on_the_address_space_makes_the_steps_smaller(
    trainer: Trainer, wide: dict[str, Any]
) -> None:
    output = trainer.root / "address-space"
    run = trainer.start(output, **wide)
    # The model is there, and the steps are to come: the evaluation before them has one row a batch.
    run.wait_for(at_phase("evaluating"))
    worker = run.worker
    limit = address_space(worker) + TOO_LITTLE
    resource.prlimit(worker, resource.RLIMIT_AS, (limit, limit))
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert_smaller(output)
    # At the same step, in the same process; on a busy machine a step may come before the limit.
    first = of_kind(output, "memory")[0]
    done = [event["step"] for event in of_kind(output, "step") if event["time"] < first["time"]]
    assert first["step"] == max(done, default=0)
    assert "can't allocate memory" in first["cause"]
    assert all(event["time"] > first["time"] for event in of_kind(output, "restart"))
    assert json.loads((output / "plan.json").read_text())["micro_batch_tokens"] < BUDGET


class MemoryGroup:
    """A memory cgroup of version 1 or 2, whose limit can be lowered."""

    def __init__(self) -> None:
        is_v1 = (CGROUP / "memory").is_dir()
        self.folder = CGROUP / ("memory" if is_v1 else "") / f"lora-trainer-test-{os.getpid()}"
        self._limit = "memory.limit_in_bytes" if is_v1 else "memory.max"
        self._usage = "memory.usage_in_bytes" if is_v1 else "memory.current"

    def __enter__(self) -> MemoryGroup:
        try:
            self.folder.mkdir()
            (self.folder / self._limit).read_text()
        except OSError:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            pytest.skip("no memory cgroup can be made here")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def usage(self) -> int:
        return int((self.folder / self._usage).read_text())

    def limit(self, count: int) -> None:
        """Set the limit; version 1 waits for a moment in which less is used."""
        until = time.monotonic() + 60
        while True:
            try:
                (self.folder / self._limit).write_text(str(count))
                return
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.001)


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with MemoryGroup() as cgroup:
        yield cgroup


@pytest.mark.any_stack  # the kernel and the supervisor decide, not torch
def test_worker_that_the_kernel_kills_for_memory_goes_on_with_smaller_steps(
    trainer: Trainer, wide: dict[str, Any], group: MemoryGroup
) -> None:
    output = trainer.root / "oom-killed"
    inside = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group.folder)]
    command = trainer.command(output, **wide | {"max_restarts": 0})
    run = Run([*inside, *command], output, trainer.environment())
    run.wait_for(at_phase("evaluating"))
    group.limit(group.usage() + TOO_LITTLE)
    ended = run.wait()
    wait_until_gone([run.process.pid])
    assert ended.code == 0, ended.err
    restarts = of_kind(output, "restart")
    assert restarts
    assert (
        "killed by the kernel for memory; continuing with micro-batches of" in restarts[0]["cause"]
    )
    assert_smaller(output)
