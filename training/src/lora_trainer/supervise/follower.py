"""The process that runs and watches one worker if a launcher has started it and it is not rank 0.

Rank 0's process supervises the run, and hears of this worker through the launcher's store. The
worker's output goes to standard error, which launchers keep for each process. Imports no torch.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from pathlib import Path

from ..config.settings import Settings
from ..errors import ERRORS_BY_CODE, InternalError, MemoryKilledError, Problem, TrainerError
from ..host.interrupts import handled
from ..host.launcher import Launch, host_name
from ..run.events import Failed
from ..run.folder import name_of_run, output_folder
from ..run.protocol import EVENTS_FD, PEER_LOST, WorkerSpec
from ..run.recording import parse_lines
from . import earlier_run
from .log_filter import open_log
from .secrets import redaction_of
from .stop_signals import STOPS, StopSignals
from .supervisor import PIPE_BYTES, WATCH_SECONDS
from .watchdog import Watchdog
from .workers import GRACE_SECONDS, WorkerGroup, cause_of

STANDARD_ERROR = Path("/dev/stderr")


class Follower:
    """One process that trains with others; rank 0's speaks for it."""

    def __init__(self, settings: Settings, launch: Launch) -> None:
        self.settings = settings
        self.launch = launch
        self.output_dir = output_folder(settings)
        self._redaction = redaction_of(settings)
        self._signals = StopSignals(is_launched=True)

    def run(self, check: Callable[[Settings], None]) -> None:
        """Run the worker to its end.

        Raises:
            TrainerError: it did not end well; with its exit code.
        """
        check(self.settings)
        if earlier_run.judge(self.output_dir, self.settings).does == "nothing":
            return
        with handled(self._signals.handle, STOPS):
            failure, code = self._attempt()
            if code == PEER_LOST:
                # Rank 0 knows why, and takes a moment to write it down: the launcher takes the
                # first process that ends for the cause.
                until = time.monotonic() + GRACE_SECONDS
                while time.monotonic() < until and not self._signals.count:
                    time.sleep(0.05)
        if code:
            raise self._error(failure, code)

    def _attempt(self) -> tuple[Failed | None, int]:
        reading, writing = os.pipe()
        config = self.settings.config
        name = name_of_run(self.settings)
        spec = WorkerSpec(
            config, self.output_dir, name, launch=self.launch, redaction=self._redaction
        )
        with open_log(STANDARD_ERROR, self._redaction) as log, os.fdopen(reading):
            worker = WorkerGroup(
                spec, 1, log=log, pass_fds=(writing,), environment={EVENTS_FD: str(writing)}
            )
            os.close(writing)
            self._signals.pass_to(worker)
            watch = Watchdog(worker.pids, STANDARD_ERROR, 0)
            failure = self._read_failure(reading)
            code = worker.wait()
        if code == -signal.SIGKILL and watch.was_out_of_memory():
            code = MemoryKilledError.exit_code
        return failure, code

    def _read_failure(self, reading: int) -> Failed | None:
        """Wait until the worker has ended; return the failure that it reported."""
        failure, torn = None, b""
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            while True:
                self._signals.look_for_launcher()
                if not selector.select(WATCH_SECONDS):
                    continue
                heard = os.read(reading, PIPE_BYTES)
                if not heard:
                    return failure
                *lines, torn = (torn + heard).split(b"\n")
                for event in parse_lines(lines):
                    if failure is None and isinstance(event, Failed):
                        failure = event

    def _error(self, failure: Failed | None, code: int) -> TrainerError:
        where = f"rank {self.launch.rank} on {host_name()}"
        if failure is not None:
            problems = [
                Problem(**problem | {"where": f"{problem['where']} ({where})"})
                for problem in failure.problems
            ]
            return ERRORS_BY_CODE.get(failure.exit_code, InternalError)(problems)
        kind = ERRORS_BY_CODE.get(code, InternalError)
        return kind.of(
            f"rank {self.launch.rank} {cause_of(code)}",
            where=where,
            why="rank 0 reports the reason" if code == PEER_LOST else "",
            remedy="see the output of rank 0",
        )
