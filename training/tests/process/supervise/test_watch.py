"""A worker that hangs is seen, shown and ended; memory and disk are told of in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_trainer import machine
from lora_trainer.run.events import Planned
from lora_trainer.run.silence import Silence
from lora_trainer.run.status import RunStatus
from lora_trainer.supervise import watchdog
from lora_trainer.supervise.watchdog import Watchdog
from support.run_events import after, stepped, training

HANGS = (
    "import faulthandler, signal, sys, time\n"
    "faulthandler.register(signal.SIGUSR1, all_threads=True)\n"
    "def a_place_to_hang_in():\n"
    "    print('ready', flush=True)\n"
    "    time.sleep(60)\n"
    "a_place_to_hang_in()\n"
)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    with (tmp_path / "train.log").open("ab") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", HANGS],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            for _ in range(2)
        ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def watched(tmp_path: Path, *pids: int, limit: float = 10.0) -> Watchdog:
    return Watchdog(pids or [os.getpid()], tmp_path / "train.log", limit)


@pytest.fixture(autouse=True)
def _score_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "OOM_SCORE", 0)


def test_silence_beyond_the_limit_is_a_stall(tmp_path: Path) -> None:
    seen = watched(tmp_path)
    assert seen.stall(training(), 9.0) == ""
    assert "no progress for 11 s in phase training (limit 10 s)" in seen.stall(training(), 11.0)


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def looked(silence: Silence, clock: Clock, seconds: float, every: float = 1.0) -> float:
    """Let the time pass with a look after every so many seconds; return what was counted."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += every
        silence.look()
    return silence.seconds


def test_silence_is_counted_from_look_to_look_and_begins_anew() -> None:
    clock = Clock()
    silence = Silence(clock)
    assert looked(silence, clock, 30.0) == 30.0
    clock.now += 0.5
    assert silence.seconds == 30.5
    silence.begin()
    assert looked(silence, clock, 2.0) == 2.0


def test_time_in_which_nobody_could_look_is_not_silence() -> None:
    clock = Clock()
    silence = Silence(clock)
    looked(silence, clock, 4.0)
    clock.now += 3600  # suspended, or stopped by a signal
    assert silence.seconds == 4.0  # asked by another thread first
    assert silence.look() == 4.0
    assert looked(silence, clock, 5.0) == 9.0


def test_a_short_limit_does_not_end_a_long_load(tmp_path: Path) -> None:
    assert watched(tmp_path, limit=1.0).stall(RunStatus(phase="loading"), 900.0) == ""


@pytest.mark.parametrize("is_stopped", [False, True], ids=["hanging", "stopped by SIGSTOP"])
def test_stacks_of_every_rank_of_a_worker_that_hangs_are_in_its_log(
    tmp_path: Path, ranks: list[subprocess.Popen[bytes]], is_stopped: bool
) -> None:
    if is_stopped:
        os.kill(ranks[1].pid, signal.SIGSTOP)
    seen = watched(tmp_path, *(process.pid for process in ranks))
    assert seen.record_stacks()
    assert (tmp_path / "train.log").read_text().count("in a_place_to_hang_in") == 2
    seen.end()
    assert [process.wait(5) for process in ranks] == [-signal.SIGKILL] * 2


def test_worker_that_cannot_show_its_stacks_does_not_hold_up_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "STACKS_SECONDS", 0.2)
    process = subprocess.Popen(["sh", "-c", "trap '' USR1; sleep 60"], start_new_session=True)
    time.sleep(0.1)
    seen = watched(tmp_path, process.pid)
    assert not seen.record_stacks()
    seen.end()
    assert process.wait(5) == -signal.SIGKILL


def test_end_takes_along_what_the_worker_started(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    watched(tmp_path, process.pid).end()
    process.wait(5)
    process.stdout.close()
    until = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_memory_near_its_limit_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "memory_bytes", lambda: (98 * 10**7, 10**9))
    seen = watched(tmp_path)
    (warning,) = seen.warnings(training())
    assert "980 MB of 1.0 GB" in warning
    assert seen.warnings(training()) == []


def test_disk_that_cannot_take_the_next_checkpoint_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "free_disk_bytes", lambda _: 10**6)
    status = after(Planned(time=1.0, plan={"trainable_parameters": 10**6}), stepped(4))
    seen = watched(tmp_path)
    (warning,) = seen.warnings(status)
    assert "1 MB left, the next checkpoint needs 12 MB" in warning
    assert seen.warnings(status) == []


@pytest.mark.parametrize("name", ["memory.events", "memory/memory.oom_control"])
def test_the_kernels_kills_for_memory_are_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / "memory").mkdir()
    assert machine.oom_kills(tmp_path) == 0
    (tmp_path / name).write_text("oom 1\noom_kill 3\n")
    assert machine.oom_kills(tmp_path) == 3
