"""Watch the worker and all its ranks for stalls, and warn about memory and disk.

A stall is no progress for longer than `health.stall_timeout`. The stack traces of all threads are
then written to the worker's log, the worker is killed, and the supervisor restarts it. Memory and
disk shortages are reported once, before they end a run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from ..machine import free_disk_bytes, oom_kills
from ..run.health import bytes_of_next_checkpoint, stall_timeout
from ..run.protocol import STACKS_SIGNAL
from ..run.status import RunStatus
from ..serve.gauges import memory_bytes
from ..units import size

STACKS_SECONDS = 5.0  # longest wait for the stacks, at least a second per rank
QUIET_LOG_SECONDS = 0.5  # the stacks are complete when the log has not grown for this long
HIGH_MEMORY = 0.95  # fraction of the limit at which to warn
# When memory runs out, the kernel kills the process with the highest score: the worker, which is
# restarted, rather than the supervisor, which records the reason.
OOM_SCORE = 500


class Watchdog:
    """Detects stalls of one worker and shortages; called by the supervisor once a second."""

    def __init__(self, pids: Sequence[int], log: Path, stall_timeout_seconds: float) -> None:
        self.pids = tuple(pids)
        self.log = log
        self._stall_timeout_seconds = stall_timeout_seconds
        self._oom_kills = oom_kills()
        self._warned: set[str] = set()
        for pid in self.pids:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))

    def stall(self, status: RunStatus, silent_seconds: float) -> str:
        """Return why a worker without progress for that long is stalled, or an empty string."""
        limit = stall_timeout(status, self._stall_timeout_seconds)
        if status.is_over or silent_seconds <= limit:
            return ""
        silence = f"no progress for {silent_seconds:.0f} s in phase {status.phase}"
        return f"made {silence} (limit {limit:.0f} s)"

    def warnings(self, status: RunStatus) -> list[str]:
        """Return new warnings about memory and disk, each only once."""
        causes = {"memory": self._memory(), "disk": self._disk(status)}
        new = {name: text for name, text in causes.items() if text and name not in self._warned}
        self._warned |= new.keys()
        return list(new.values())

    def was_out_of_memory(self) -> bool:
        """Return whether the kernel killed a process of this cgroup for memory since the start."""
        return oom_kills() > self._oom_kills

    def record_stacks(self) -> bool:
        """Make the ranks log the stacks of their threads, one by one; return whether any did.

        A rank stopped by a signal is continued: its handler runs first.
        """
        seconds = max(1.0, STACKS_SECONDS / len(self.pids))
        wrote = [self._stacks_of(pid, seconds) for pid in self.pids]
        return any(wrote)

    def _stacks_of(self, pid: int, seconds: float) -> bool:
        before = _size(self.log)
        until = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
            os.kill(pid, signal.SIGCONT)
        last, changed = before, time.monotonic()
        while time.monotonic() < until:
            time.sleep(0.05)
            if (now := _size(self.log)) != last:
                last, changed = now, time.monotonic()
            elif now > before and time.monotonic() - changed > QUIET_LOG_SECONDS:
                break
        return last > before

    def end(self) -> None:
        """Kill every rank and its child processes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _memory(self) -> str:
        used, limit = memory_bytes()
        if used < HIGH_MEMORY * limit:
            return ""
        return (
            f"memory is nearly full: {size(used)} of {size(limit)}; if it runs out, the worker is "
            "killed and restarted from its last checkpoint"
        )

    def _disk(self, status: RunStatus) -> str:
        needed = bytes_of_next_checkpoint(status)
        free = free_disk_bytes(self.log.parent)
        if not needed or free >= needed:
            return ""
        return (
            f"the disk has {size(free)} left, the next checkpoint needs {size(needed)}: free disk "
            f"space in {self.log.parent}"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
