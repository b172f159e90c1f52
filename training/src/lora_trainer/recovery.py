"""Faults that a second try may avoid: whether a worker that ended for one is started again.

These restarts are no crashes: they do not count against `max_restarts`, and each kind has a
bound of its own. Imports no torch.
"""

from __future__ import annotations

from .errors import NotFiniteError
from .events import Failed


class Recovery:
    """What was tried so far in this run; asked each time that a worker ends."""

    def __init__(self) -> None:
        self._not_finite_step = -1

    def after(self, failure: Failed | None) -> str:
        """Return why the worker is started again; nothing where the usual rules decide."""
        if failure is not None and failure.retry == NotFiniteError.KIND:
            return self._after_not_finite(failure)
        return ""

    def _after_not_finite(self, failure: Failed) -> str:
        """Try each step once more; one that fails again, or an earlier one, is final."""
        if failure.step <= self._not_finite_step:
            return ""
        self._not_finite_step = failure.step
        return f"{failure.problems[0]['what']}; tried once more from the last checkpoint"
