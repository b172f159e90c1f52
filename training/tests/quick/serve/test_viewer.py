"""A run shown from its folder alone: finished, going on, abandoned, or not there."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from lora_trainer.errors import ConfigError
from lora_trainer.redaction import Redaction
from lora_trainer.run.events import Ended, RunStarted
from lora_trainer.run.lock import is_held, own_address
from lora_trainer.run_folder import RunFolder
from lora_trainer.serve.follower import EventFollower, stall_timeout_seconds
from lora_trainer.serve.replay import view
from lora_trainer.serve.run_state import RunState
from support.run_events import PLAN, RUN, START, stepped

PID_OF_NOBODY = 2**22 + 1


def record(folder: Path, *events, mode: str = "a") -> None:
    with RunFolder(folder).events.open(mode) as file:
        file.writelines(event.to_line() for event in events)


def lock(folder: Path, pid: int, host: str = "") -> None:
    RunFolder(folder).lock.write_text(f"pid {pid} on {host or socket.gethostname()}\n")


@pytest.fixture
def recording(tmp_path: Path) -> EventFollower:
    return EventFollower(tmp_path, RunState(Redaction(["canary-77"])))


def test_finished_run_is_shown_whole_and_well(recording: EventFollower, tmp_path: Path):
    record(tmp_path, *RUN, Ended(time=100.0, exit_code=0))
    recording.read()
    live = recording.live
    assert (live.status.phase, live.status.step, live.is_abandoned) == ("finished", 40, False)
    assert live.health().status == "healthy"
    assert len(live.series(1000)["points"]) == 40


def test_run_that_goes_on_is_followed_line_by_line(recording: EventFollower, tmp_path: Path):
    lock(tmp_path, os.getpid())
    record(tmp_path, START, PLAN, stepped(1))
    recording.read()
    before = recording.live.sequence
    whole = stepped(2).to_line()
    with RunFolder(tmp_path).events.open("a") as file:
        file.write(whole[:30])
    recording.read()
    assert recording.live.status.step == 1
    with RunFolder(tmp_path).events.open("a") as file:
        file.write(whole[30:])
    recording.read()
    assert recording.live.status.step == 2
    assert recording.live.sequence == before + 1
    assert recording.live.is_abandoned is False


def test_another_run_in_the_folder_begins_anew(recording: EventFollower, tmp_path: Path):
    record(tmp_path, START, PLAN, stepped(1), stepped(2))
    recording.read()
    RunFolder(tmp_path).events.rename(tmp_path / "aside")
    record(tmp_path, RunStarted(time=9.0, run_name="b", config_digest="d2", output_dir="o"))
    recording.read()
    assert (recording.live.status.run_name, recording.live.status.step) == ("b", 0)


def test_run_whose_process_is_gone_is_told_to_be_abandoned(
    recording: EventFollower, tmp_path: Path
):
    lock(tmp_path, PID_OF_NOBODY)
    record(tmp_path, START, PLAN, stepped(1))
    recording.read()
    assert recording.live.is_abandoned
    judged = recording.live.health()
    assert judged.status == "unhealthy"
    assert "died" in judged.reason
    assert judged.is_training is False


def test_secret_of_an_older_recording_is_not_shown(recording: EventFollower, tmp_path: Path):
    started = RunStarted(time=9.0, run_name="canary-77", config_digest="d", output_dir="o")
    record(tmp_path, started)
    recording.read()
    record(tmp_path, started)
    recording.read()
    assert recording.live.status.run_name == "***"
    assert b"canary" not in b"".join(one.data for one in recording.live.frames_after(1)[0])


def test_run_on_another_host_may_be_alive(tmp_path: Path):
    lock(tmp_path, PID_OF_NOBODY, host="elsewhere")
    assert is_held(tmp_path)


def test_folder_without_a_lock_is_held_by_nobody(tmp_path: Path):
    assert not is_held(tmp_path)


def test_worker_that_outlives_its_supervisor_still_holds_the_folder(tmp_path: Path):
    lock(tmp_path, PID_OF_NOBODY)
    with RunFolder(tmp_path).lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_folder_without_a_run_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="no run to show"):
        view(
            tmp_path, host="127.0.0.1", port=0, token_file=None, allowed_hosts=(), say=print,
        )  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"monitoring": 3}', "\x00"])
def test_damaged_files_beside_the_events_are_passed_over(tmp_path: Path, content):
    for name in ("config.resolved.json", "server.json"):
        (tmp_path / name).write_text(content)
    assert stall_timeout_seconds(tmp_path) == 0.0
    assert own_address(tmp_path) == ""
