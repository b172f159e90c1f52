"""Limit the restarts of crashed workers."""

from __future__ import annotations

from ..run.status import RunStatus

RENEWING_STEPS = 10


class Restarts:
    """The restarts of one run, at most `limit` of them without progress in between.

    Progress means `RENEWING_STEPS` steps, or a checkpoint, beyond the point where a worker ended
    before; it resets the count. A worker that ends at the same step as the previous one is not
    restarted, whatever the count.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.attempt = 0  # the number of the worker that runs, from 0
        self._used = 0
        self._position: tuple[int, bool] | None = None  # where the last worker ended
        self._furthest = 0

    def refusal(self, status: RunStatus) -> str:
        """Return why a worker that ended at this status is not restarted, or an empty string."""
        position = (status.step, status.steps_in_attempt > 0)
        if position == self._position:
            return f"it ended at step {status.step} twice in a row"
        if self.limit == 0:
            return "it is not restarted here"
        if self._used_at(status) >= self.limit:
            return f"it was restarted {self.limit} times without progress"
        return ""

    def take(self, status: RunStatus) -> int:
        """Count a restart after a worker that ended at this status; return its number."""
        self._used = self._used_at(status) + 1
        self._position = (status.step, status.steps_in_attempt > 0)
        self._furthest = max(self._furthest, status.step)
        self.attempt += 1
        return self.attempt

    def spare(self) -> int:
        """Count a restart without a crash (see `recovery`); return its number."""
        self.attempt += 1
        return self.attempt

    def _used_at(self, status: RunStatus) -> int:
        saved = max((one.step for one in status.checkpoints), default=0)
        has_progress = status.step >= self._furthest + RENEWING_STEPS or saved > self._furthest
        return 0 if has_progress else self._used
