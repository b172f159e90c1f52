"""Every error a user can see: one exception per exit code, each with cause, place and remedy.

A `Problem` is one finding; an error carries all findings of its kind, so that a user can fix them
all at once. `cli` prints them last, as one block, and exits with the error's code. Only mistakes
that a user can cause are raised as `TrainerError`; our own invariants are asserts and surface as
`InternalError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from .host.quoting import printable


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: what is wrong, where, why, and the command or edit that fixes it."""

    what: str
    where: str = ""
    why: str = ""
    remedy: str = ""

    def lines(self) -> list[str]:
        """Return the finding as printable lines, without empty fields."""
        labelled = (("where", self.where), ("why", self.why), ("remedy", self.remedy))
        shown = ((name, printable(text, keep_newlines=name == "why")) for name, text in labelled)
        return [printable(self.what), *(f"  {name + ':':<8}{text}" for name, text in shown if text)]


class TrainerError(Exception):
    """An error with its own exit code; only its subclasses are raised."""

    exit_code: ClassVar[int]
    # Why a retry from the last checkpoint may succeed, if it may (see `recovery`).
    retry: str = ""
    step: int = 0  # the optimizer step in which it happened, if known

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        assert self.problems, "an error states at least one problem"
        super().__init__("; ".join(problem.what for problem in self.problems))

    @classmethod
    def of(cls, what: str, where: str = "", why: str = "", remedy: str = "") -> TrainerError:
        """Create the error from a single problem."""
        return cls(Problem(what, where, why, remedy))

    def block(self) -> str:
        """Return the text that is printed last, before the process exits."""
        lines = [line for problem in self.problems for line in problem.lines()]
        text = "\n".join([*lines, f"exit code {self.exit_code} ({self.meaning})"])
        # A key or a name may contain a lone surrogate, which no terminal can print.
        return text.encode("utf-8", "backslashreplace").decode()

    @property
    def meaning(self) -> str:
        """Return the meaning of the exit code."""
        return MEANINGS[self.exit_code]


class DataError(TrainerError):
    """The dataset cannot be used for training as it is."""

    exit_code = 65


class UnavailableError(TrainerError):
    """The requested model, hub or device is unavailable."""

    exit_code = 69


class InternalError(TrainerError):
    """A bug in the program, or a stalled worker."""

    exit_code = 70


class NotFiniteError(InternalError):
    """A loss, a gradient, a weight or an evaluation is NaN or infinite."""

    KIND: ClassVar[str] = "not_finite"


class StorageError(TrainerError):
    """The disk is full, or reading or writing failed."""

    exit_code = 74


class BusyError(TrainerError):
    """Another run is using the output folder."""

    exit_code = 75


class AccessError(TrainerError):
    """A permission is missing: a volume, a file, a gated model."""

    exit_code = 77


class ConfigError(TrainerError):
    """The configuration is wrong."""

    exit_code = 78


class MemoryKilledError(TrainerError):
    """The run was out of memory after all retries."""

    KIND: ClassVar[str] = "memory"
    exit_code = 137


class StoppedError(TrainerError):
    """The run was stopped by a signal; its problem states what is saved and what is lost."""

    exit_code = 143


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and its chain of causes, the root cause last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


MEANINGS = {
    0: "finished",
    65: "data",
    69: "model, hub or device unavailable",
    70: "internal fault, stalled worker, or non-finite numbers",
    74: "disk full or I/O",
    75: "another run is using this output",
    77: "no permission",
    78: "configuration",
    137: "killed for memory",
    143: "stopped by signal",
}
ERRORS_BY_CODE: dict[int, type[TrainerError]] = {
    error.exit_code: error
    for error in (
        DataError,
        UnavailableError,
        InternalError,
        StorageError,
        BusyError,
        AccessError,
        ConfigError,
        MemoryKilledError,
        StoppedError,
    )
}
