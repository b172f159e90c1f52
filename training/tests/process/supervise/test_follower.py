"""The processes of a launcher: rank 0's supervises, and does not restart what it cannot join."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_trainer.config.settings import resolve
from lora_trainer.errors import DataError, InternalError, MemoryKilledError, StoppedError
from lora_trainer.host.launcher import Launch
from lora_trainer.run.events import Failed
from lora_trainer.run.protocol import PEER_LOST
from lora_trainer.supervise import endings, follower
from lora_trainer.supervise.follower import Follower
from lora_trainer.supervise.supervisor import Supervisor
from support.shell_worker import play, says, step_line

LAUNCH = Launch(1, 2, 1, 2, "127.0.0.1", 29500, "torchrun", has_agent_store=True)
WAITS = "trap 'exit 143' TERM; while :; do sleep 0.02; done"


def follower_of(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Follower:
    play(folder, monkeypatch, script)
    given = ["--output_dir", str(folder / "out"), "--health_port", "0"]
    return Follower(resolve(None, {}, given), LAUNCH)


def first_of(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Supervisor:
    play(folder, monkeypatch, script)
    monkeypatch.setattr(endings, "write_report", lambda _: None)
    settings = resolve(None, {}, ["--output_dir", str(folder / "out"), "--health_port", "0"])
    return Supervisor(settings, lambda *_: None, launch=replace(LAUNCH, rank=0, local_rank=0))


def test_a_worker_gets_its_rank_from_its_spec_and_not_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    follower_of(tmp_path, monkeypatch, f"env > {tmp_path}/environment").run(lambda _: None)
    spec = json.loads((tmp_path / "order").read_text())
    assert (spec["rank"], spec["ranks"], spec["launch"]["local_rank"]) == (1, 2, 1)
    names = {line.split("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert not names & {"RANK", "MASTER_ADDR"}
    assert "GLOO_SOCKET_IFNAME" in names
    assert not (tmp_path / "out").exists()  # the run's folder is rank 0's


def test_a_follower_ends_with_its_workers_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [{"what": "a bad row", "where": "train.jsonl", "why": "", "remedy": ""}]
    failed = Failed(exit_code=65, problems=problems).to_line()
    with pytest.raises(DataError, match="a bad row") as caught:
        follower_of(tmp_path, monkeypatch, f"{says(failed)} exit 65").run(lambda _: None)
    assert "rank 1 on" in caught.value.problems[0].where


def test_a_follower_that_lost_a_peer_lets_rank_0_end_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "GRACE_SECONDS", 0.4)
    begun = time.monotonic()
    with pytest.raises(InternalError, match="lost another rank"):
        follower_of(tmp_path, monkeypatch, f"exit {PEER_LOST}").run(lambda _: None)
    assert time.monotonic() - begun >= 0.4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_follower_passes_a_stop_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    script = WAITS.replace("; while", f"; touch {tmp_path}/ready; while")
    with pytest.raises(StoppedError):
        follower_of(tmp_path, monkeypatch, script).run(lambda _: None)
    thread.join()


def test_rank_0_does_not_restart_a_worker_that_the_others_could_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = first_of(tmp_path, monkeypatch, says(step_line(3)) + "kill -KILL $$")
    with pytest.raises(MemoryKilledError, match="rank 0 was killed") as caught:
        run.run()
    assert (tmp_path / "count").read_text().strip() == "1"
    assert caught.value.problems[0].why == "it is not restarted here"


def test_a_retry_with_smaller_batches_is_left_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [{"what": "the loss is NaN", "where": "step 4", "why": "", "remedy": ""}]
    failed = Failed(exit_code=70, problems=problems, retry="not_finite", step=4).to_line()
    run = first_of(tmp_path, monkeypatch, says(step_line(3), failed) + "exit 70")
    with pytest.raises(InternalError, match="retrying once from the last checkpoint") as caught:
        run.run()
    assert "torchrun does it" in caught.value.problems[0].remedy
    assert (tmp_path / "count").read_text().strip() == "1"


def test_a_process_whose_launcher_was_killed_stops_the_run(tmp_path: Path) -> None:
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    script = f"trap 'touch {stopped}; exit 143' TERM; touch {ready}; while :; do sleep 0.02; done"
    code = f"""
import sys, pytest
from pathlib import Path
sys.path[:0] = {sys.path!r}
from tests.process.supervise.test_follower import follower_of
follower_of(Path({str(tmp_path)!r}), pytest.MonkeyPatch(), {script!r}).run(lambda _: None)
"""
    (tmp_path / "process.py").write_text(code)
    # The launcher: it starts the process, and dies.
    launcher = f"{sys.executable} {tmp_path}/process.py 2>/dev/null &"
    launcher += f"until [ -e {ready} ]; do sleep 0.05; done; kill -KILL $$"
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run(["sh", "-c", launcher], check=False, cwd=root, env=environment)
    until = time.monotonic() + 30
    while not stopped.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert stopped.exists()
