"""A worker that is killed, hangs or is not listened to: what is said of it, and what is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from support.same_bytes import assert_same_as
from support.trainer import Run, Trainer, at_step, events_of, losses, of_kind

LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Poller:
    """Asks /health of a run again and again, as a load balancer does."""

    def __init__(self, run: Run) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self._run = run
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _poll(self) -> None:
        while self._run.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                server = json.loads((self._run.output / "server.json").read_text())
                self.answers.append(ask(f"{server['url']}/health"))
            time.sleep(0.02)

    def changes(self) -> list[int]:
        """Return the codes in their order, repeated ones once."""
        codes = [code for code, _ in self.answers]
        return [code for i, code in enumerate(codes) if i == 0 or codes[i - 1] != code]

    def reasons(self) -> set[str]:
        return {answer["reason"] for code, answer in self.answers if code == 503}


def ask(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with LOCAL.open(url, timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_killed_worker_is_told_of_started_again_and_nothing_is_lost(
    trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "worker-killed"
    run = trainer.start(output)
    run.wait_for(at_step(23))
    with Poller(run) as poller:
        os.kill(run.worker, signal.SIGKILL)
        ended = run.wait()
    assert ended.code == 0, ended.err
    (restart,) = of_kind(output, "restart")
    assert restart["exit_code"] == -signal.SIGKILL
    assert poller.changes() in ([200, 503, 200], [503, 200])
    assert any("SIGKILL" in reason for reason in poller.reasons())
    assert_same_as(undisturbed, output)


def test_worker_that_hangs_is_unhealthy_shows_its_stacks_and_ends_the_run(
    trainer: Trainer, tmp_path: Path
) -> None:
    run = trainer.start(tmp_path / "hangs", max_restarts=0, stall_timeout_seconds=5.0)
    run.wait_for(at_step(5))
    with Poller(run) as poller:
        os.kill(run.worker, signal.SIGSTOP)
        ended = run.wait()
    assert ended.code == 70
    assert "made no progress" in ended.block
    assert any("no progress for" in reason for reason in poller.reasons())
    log = (run.output / "train.log").read_text()
    assert "loop.py" in log
    assert " in train" in log


def test_stopped_supervisor_holds_up_no_step_and_loses_no_event(
    trainer: Trainer, undisturbed: Path
) -> None:
    output = trainer.root / "supervisor-held-up"
    run = trainer.start(output)
    run.wait_for(at_step(10))
    worker = run.worker
    run.process.send_signal(signal.SIGSTOP)
    before = len(events_of(output))
    until = time.monotonic() + 120
    while not (output / "final_model").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (output / "final_model").exists(), f"worker {worker} waited for its reader"
    assert len(events_of(output)) == before
    run.process.send_signal(signal.SIGCONT)
    ended = run.wait()
    assert ended.code == 0, ended.err
    assert losses(output) == losses(undisturbed)
