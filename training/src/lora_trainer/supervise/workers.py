"""The worker processes of one attempt as a group: started, signalled and ended together.

`WorkerGroup` looks like a single process to the supervisor. A rank that fails ends the group, since
the others would wait for it forever; its exit code is the group's. This replaces torchrun
(docs/decisions/0012-ranks-without-a-wrapper.md explains why). Imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from ..host.scratch import TEMPORARY, scratch_folder
from ..machine import read_machine
from ..run.protocol import PEER_LOST, WorkerSpec

# How long the other ranks may take to end after one has failed.
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.05
WORKER_DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    # Waiting OpenMP threads spin, and on a shared core they delay the others: a step took 80 s
    # instead of 2 (docs/decisions/0006-threads-that-wait.md).
    "GOMP_SPINCOUNT": "1000",
}
# Communication between ranks stays on this machine.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class WorkerGroup:
    """`count` workers with the same spec, one event pipe and one log."""

    def __init__(
        self,
        spec: WorkerSpec,
        count: int,
        *,
        log: IO[bytes] | int,
        pass_fds: Sequence[int],
        environment: Mapping[str, str],
    ) -> None:
        self._meeting = contextlib.ExitStack()
        store = ""
        if count > 1:  # one process needs no rendezvous store
            parent = Path(tempfile.gettempdir())
            store = str(self._meeting.enter_context(scratch_folder(parent, TEMPORARY)) / "store")
        self._fallen: int | None = None  # the first rank that ended badly by itself
        own = _defaults(count) | os.environ | dict(environment) | _python_path()
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "lora_trainer.train.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                env=own,
            )
            for _ in range(count)
        ]
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()
        for rank, process in enumerate(self._ranks):
            own_spec = replace(spec, rank=rank, ranks=count, store=store)
            assert process.stdin is not None
            # The watcher notices one that has already died.
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(own_spec.to_json().encode())

    @property
    def pid(self) -> int:
        """Return the process id of rank 0, which speaks for all."""
        return self._ranks[0].pid

    @property
    def pids(self) -> list[int]:
        """Return every rank's process id."""
        return [process.pid for process in self._ranks]

    def poll(self) -> int | None:
        """Return the group's exit code, None while any rank runs."""
        return None if self._watcher.is_alive() else self._code()

    def wait(self) -> int:
        """Wait for the last rank; return the group's exit code."""
        self._watcher.join()
        return self._code()

    def send_signal(self, number: int) -> None:
        """Signal every rank that runs."""
        for process in self._ranks:
            process.send_signal(number)

    def kill(self) -> None:
        """End every rank, and all that it started, at once."""
        for process in self._ranks:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    @property
    def fallen(self) -> str:
        """Return a prefix such as "rank 2 ", which ended the group; empty with one rank."""
        return f"rank {self._fallen or 0} " if len(self._ranks) > 1 else ""

    def _code(self) -> int:
        if self._fallen is not None:
            return int(self._ranks[self._fallen].returncode)
        is_lost = any(process.returncode == PEER_LOST for process in self._ranks)
        return PEER_LOST if is_lost else int(self._ranks[0].returncode)

    def _watch(self) -> None:
        """Wait for all ranks; once one is gone for good, give the others a little time."""
        until = math.inf
        while True:
            codes = [process.poll() for process in self._ranks]
            is_over = time.monotonic() > until
            bad = [rank for rank, code in enumerate(codes) if code not in (None, 0, PEER_LOST)]
            if bad and self._fallen is None and not is_over:
                self._fallen = bad[0]
            if None not in codes:
                break
            if is_over:
                self.kill()
            elif until == math.inf and (codes[0] is not None or any(codes)):
                until = time.monotonic() + GRACE_SECONDS
            time.sleep(POLL_SECONDS)
        self._meeting.close()


def _defaults(count: int) -> dict[str, str]:
    """Return default environment variables of a worker that the user has not set."""
    if count == 1:
        return WORKER_DEFAULTS | LOOPBACK
    threads = max(1, read_machine().cores // count)
    return WORKER_DEFAULTS | LOOPBACK | {"OMP_NUM_THREADS": str(threads)}


def cause_of(code: int) -> str:
    """Return how a worker ended, as text."""
    if code == PEER_LOST:
        return "lost another rank"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL: by the kernel for memory, or by someone)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _python_path() -> dict[str, str]:
    """Let the worker import this package from wherever the supervisor has it."""
    own = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{own}{os.pathsep}{rest}" if rest else own}
