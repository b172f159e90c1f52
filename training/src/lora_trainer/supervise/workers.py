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

from ..host.launcher import LOOPBACK, OWN_VARIABLES, Launch, network_of
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
        launch, store = spec.launch, ""
        self._first = launch.rank if launch else 0
        if count > 1:  # one process needs no rendezvous store
            parent = Path(tempfile.gettempdir())
            store = str(self._meeting.enter_context(scratch_folder(parent, TEMPORARY)) / "store")
        self._is_shared = count > 1 or (launch is not None and not launch.is_alone)
        self._fallen: int | None = None  # the first rank that ended badly by itself
        own = _defaults(count, launch) | _inherited(launch) | dict(environment) | python_path()
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
            ranks = launch.count if launch else count
            own_spec = replace(spec, rank=self._first + rank, ranks=ranks, store=store)
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
        number = self._first + (self._fallen or 0)
        return f"rank {number} " if self._is_shared else ""

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


def _defaults(count: int, launch: Launch | None) -> dict[str, str]:
    """Return default environment variables of a worker that the user has not set."""
    network = network_of(launch) if launch else LOOPBACK
    count = launch.local_count if launch else count
    if count == 1:
        return WORKER_DEFAULTS | network
    threads = max(1, read_machine().cores // count)
    return WORKER_DEFAULTS | network | {"OMP_NUM_THREADS": str(threads)}


def _inherited(launch: Launch | None) -> dict[str, str]:
    """Return this process's environment; a worker has its number from its spec instead."""
    own = OWN_VARIABLES if launch else ()
    return {name: value for name, value in os.environ.items() if name not in own}


def cause_of(code: int) -> str:
    """Return how a worker ended, as text."""
    if code == PEER_LOST:
        return "lost another rank"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL: by the kernel for memory, or by someone)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def python_path() -> dict[str, str]:
    """Let a child process import this package from wherever the supervisor has it."""
    own = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{own}{os.pathsep}{rest}" if rest else own}
