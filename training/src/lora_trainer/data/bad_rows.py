"""Rows as read from files, what makes a row unusable, and the policy for such rows.

A row's text never leaves this package: findings only contain file, line, field, types and lengths.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError, Problem

MAX_ROW_BYTES = 1_000_000
MAX_DEPTH = 64
"""Maximum nesting of a row; deeper ones overflow the stack of JSON, pickle and Jinja."""
MAX_LISTED = 20
"""Maximum number of bad rows listed in an error."""

BadRowPolicy = Literal["error", "skip"]
RowValue = dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset, its location as `file:line`, and its size if measured."""

    value: RowValue
    where: str
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class BadRow:
    """An unusable row: its location and the reason."""

    where: str
    reason: str


def shown_name(name: object) -> str:
    """Return a field name for a message: quoted, printable, at most 40 characters."""
    text = str(name)
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def fault_in(value: RowValue) -> str | None:
    """Return what makes a row unusable in any format, or None.

    Finds NUL characters, text that is not UTF-8, deep nesting and rows of 1 MB or more.
    """
    return measure(value)[1]


def measure(value: RowValue) -> tuple[int, str | None]:
    """Return a row's size in bytes and, as `fault_in`, what makes it unusable."""
    size = 0
    for name, field in value.items() if isinstance(value, dict) else [("", value)]:
        stack: list[tuple[Any, int]] = [(name, 0), (field, 1)]
        while stack:
            item, depth = stack.pop()
            if isinstance(item, str):
                length, fault = _text_fault(item)
                if fault:
                    return (
                        size,
                        f"field {shown_name(name)} {fault}" if name else f"the line {fault}",
                    )
                size += length
            elif isinstance(item, bytes):
                size += len(item)
            elif isinstance(item, dict | list | tuple):
                if depth > MAX_DEPTH:
                    return (
                        size,
                        f"field {shown_name(name)} is nested more than {MAX_DEPTH} levels deep",
                    )
                values = [*item.keys(), *item.values()] if isinstance(item, dict) else item
                stack.extend((part, depth + 1) for part in values)
                size += 2
            if size >= MAX_ROW_BYTES:
                return size, oversize_reason()
    return size, None


def _text_fault(text: str) -> tuple[int, str | None]:
    """Return a text's length in bytes and its fault, if any."""
    if "\0" in text:
        return 0, "contains a NUL character"
    if text.isascii():
        return len(text), None
    try:
        return len(text.encode()), None
    except UnicodeEncodeError:
        return 0, "is not valid UTF-8"


def oversize_reason() -> str:
    """Return the fault of a row that is too large."""
    return f"the row is {MAX_ROW_BYTES:,} bytes or larger"


class BadRowLog:
    """Counts rows and bad rows, and rejects a dataset according to the policy."""

    def __init__(self, policy: BadRowPolicy = "error", max_fraction: float = 0.05) -> None:
        self.policy = policy
        self.max_fraction = max_fraction
        self.rows_read = 0
        self.total = 0
        self.first: list[BadRow] = []
        self.reasons: Counter[str] = Counter()

    @property
    def is_refused(self) -> bool:
        """Return whether the rows seen so far are enough to reject the dataset."""
        return self.policy == "error" and self.total > 0

    def add(self, bad: BadRow) -> None:
        """Count a bad row; reasons that differ only by a number are counted together."""
        self.total += 1
        self.reasons[re.sub(r"\d[\d,]*", "N", bad.reason)] += 1
        if len(self.first) < MAX_LISTED:
            self.first.append(bad)

    def check(self) -> None:
        """Apply the policy once all rows are read.

        Raises:
            DataError: there are more bad rows than allowed.
        """
        if problems := self.problems():
            raise DataError(problems)

    def problems(self) -> list[Problem]:
        """Return why the dataset is rejected, with the first bad rows; empty if it is accepted."""
        if self.total == 0:
            return []
        fraction = self.total / max(self.rows_read, self.total)
        if self.policy == "skip" and fraction <= self.max_fraction:
            return []
        counted = f"{self.total:,} of {self.rows_read:,} rows cannot be used"
        if self.policy == "skip":
            head = Problem(
                what=f"{counted}: {fraction:.1%}, "
                f"more than max_bad_rows_share ({self.max_fraction:.1%})",
                remedy="fix the listed rows, or raise max_bad_rows_share",
            )
        else:
            remedy = "fix the listed rows, or set on_bad_rows: skip to leave them out"
            if fraction > self.max_fraction:
                remedy = (
                    f"fix the rows listed: {fraction:.1%} are too many to skip "
                    f"(max_bad_rows_share is {self.max_fraction:.1%})"
                )
            head = Problem(what=counted, remedy=remedy)
        return [head, *listed_problems(self.first, self.total)]


def listed_problems(first: Sequence[BadRow], total: int) -> list[Problem]:
    """Return one finding per row for the first rows, and the number of the others."""
    listed = [Problem(what=bad.reason, where=bad.where) for bad in first[:MAX_LISTED]]
    if total > len(listed):
        listed.append(Problem(what=f"and {total - len(listed):,} more"))
    return listed
