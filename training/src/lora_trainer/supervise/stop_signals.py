"""The signals that stop a run, and the launcher's death, which does as well."""

from __future__ import annotations

import os
import signal

from .workers import WorkerGroup

# A lost terminal stops a run too, unless nohup started it. Slurm sends SIGUSR1, or another one
# that `--signal` names, some time before it ends a job.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Passes the first stop signal to the worker; a third one ends it at once."""

    def __init__(self, *, is_launched: bool) -> None:
        self.count = 0
        self._worker: WorkerGroup | None = None
        self._parent = os.getppid() if is_launched else 0

    def pass_to(self, worker: WorkerGroup) -> None:
        """Pass signals to this worker from now on, and one that has come before it."""
        self._worker = worker
        if self.count:
            worker.send_signal(signal.SIGTERM)

    def handle(self, number: int, _frame: object) -> None:
        """Handle a signal."""
        self.count += 1
        worker = self._worker
        if worker is None or worker.poll() is not None:
            return
        if self.count == 1:
            worker.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
        elif self.count >= 3:
            worker.kill()

    def look_for_launcher(self) -> None:
        """Stop the run if the launcher has been killed: nobody would start it again."""
        if self._parent and os.getppid() != self._parent and not self.count:
            self.handle(signal.SIGTERM, None)
