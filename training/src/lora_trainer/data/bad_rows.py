"""Rows as they are read, what makes one unusable, and the policy for unusable ones.

A row's text never leaves this package: a finding names the file, the line, the
field, types and lengths, nothing else.
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
"""Nesting of a row; deeper ones overflow the stack of JSON, pickle and Jinja alike."""
MAX_LISTED = 20
"""Bad rows that an error lists one by one."""

BadRowPolicy = Literal["error", "skip"]
RowValue = dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset, where it stands, as `file:line`, and its size where measured."""

    value: RowValue
    where: str
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it stands and why."""

    where: str
    reason: str


def shown_name(name: object) -> str:
    """Return a field name fit for a message: quoted, printable, at most 40 characters."""
    text = str(name)
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def fault_in(value: RowValue) -> str | None:
    """Return what makes a row unusable whatever its format is, or None.

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
                        f"field {shown_name(name)} is nested deeper than {MAX_DEPTH} levels",
                    )
                values = [*item.keys(), *item.values()] if isinstance(item, dict) else item
                stack.extend((part, depth + 1) for part in values)
                size += 2
            if size >= MAX_ROW_BYTES:
                return size, oversize_reason()
    return size, None


def _text_fault(text: str) -> tuple[int, str | None]:
    """Return a text's length in bytes and what is wrong with it."""
    if "\0" in text:
        return 0, "holds a NUL character"
    if text.isascii():
        return len(text), None
    try:
        return len(text.encode()), None
    except UnicodeEncodeError:
        return 0, "is not valid UTF-8"


def oversize_reason() -> str:
    """Say that a row is too big to be one."""
    return f"the row has {MAX_ROW_BYTES:,} bytes or more"


class BadRowLog:
    """Counts the rows that were read and the bad ones, and refuses a dataset by its policy."""

    def __init__(self, policy: BadRowPolicy = "error", max_fraction: float = 0.05) -> None:
        self.policy = policy
        self.max_fraction = max_fraction
        self.rows_read = 0
        self.total = 0
        self.first: list[BadRow] = []
        self.reasons: Counter[str] = Counter()

    @property
    def is_refused(self) -> bool:
        """Tell whether the rows seen so far are enough to refuse the dataset for good."""
        return self.policy == "error" and self.total > 0

    def add(self, bad: BadRow) -> None:
        """Count a bad row; reasons that differ by a number only are counted together."""
        self.total += 1
        self.reasons[re.sub(r"\d[\d,]*", "N", bad.reason)] += 1
        if len(self.first) < MAX_LISTED:
            self.first.append(bad)

    def check(self) -> None:
        """Judge the rows once all are read.

        Raises:
            DataError: bad rows where none are allowed, or a larger share than allowed.
        """
        if problems := self.problems():
            raise DataError(problems)

    def problems(self) -> list[Problem]:
        """Return why the dataset is refused, the first bad rows listed; empty if it is not."""
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
                remedy="fix the rows listed, or raise max_bad_rows_share",
            )
        else:
            remedy = "fix the rows listed, or set on_bad_rows to skip to leave them out"
            if fraction > self.max_fraction:
                remedy = (
                    f"fix the rows listed: {fraction:.1%} are too many to skip "
                    f"(max_bad_rows_share is {self.max_fraction:.1%})"
                )
            head = Problem(what=counted, remedy=remedy)
        return [head, *listed_problems(self.first, self.total)]


def listed_problems(first: Sequence[BadRow], total: int) -> list[Problem]:
    """Return one finding for each of the first rows, and how many more there are."""
    listed = [Problem(what=bad.reason, where=bad.where) for bad in first[:MAX_LISTED]]
    if total > len(listed):
        listed.append(Problem(what=f"and {total - len(listed):,} more"))
    return listed
