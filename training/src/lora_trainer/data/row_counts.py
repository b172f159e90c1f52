"""Count what happens to a dataset's rows, reject it if necessary, and report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ..errors import DataError, Problem
from .bad_rows import MAX_LISTED, BadRow, BadRowLog, listed_problems
from .cache import TokenizedDataset
from .encoder import EncodedChunk


@dataclass(frozen=True, slots=True)
class DataReport:
    """What happened to the rows of a dataset; serializable as JSON.

    `formats` has one entry per source. `longest_tokens` is before truncation, the other lengths are
    after it. `rows_changed` counts the rows whose training text differs from the row, by the kind
    of change. `cache` says whether the tokens were created, reused, or rebuilt and why;
    `processes_restarted` is the number of tokenizing processes that died.
    """

    rows_read: int
    rows_used: int
    rows_truncated: int
    rows_skipped: dict[str, int]
    rows_dropped: dict[str, int]
    rows_changed: dict[str, int]
    unused_fields: list[str]
    rows_repeated: int
    formats: list[str]
    tokens: int
    trained_tokens: int
    mean_tokens: float
    p50_tokens: int
    p90_tokens: int
    p99_tokens: int
    max_tokens: int
    longest_tokens: int
    digest: str
    cache: str
    processes_restarted: int = 0


@dataclass(slots=True)
class Tally:
    """Counts over the chunks of one dataset."""

    log: BadRowLog
    dropped: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    longest: int = 0
    flawed: list[BadRow] = field(default_factory=list)
    too_long: list[BadRow] = field(default_factory=list)
    too_long_total: int = 0

    def add(self, chunk: EncodedChunk) -> None:
        """Count a chunk."""
        self.log.rows_read += chunk.rows
        for bad in chunk.bad:
            self.log.add(bad)
        self.dropped.update(chunk.dropped)
        self.changes.update(chunk.changes)
        self.truncated += chunk.truncated
        self.longest = max(self.longest, chunk.longest)
        self.flawed.extend(chunk.flawed)
        self.too_long_total += len(chunk.too_long)
        self.too_long = (self.too_long + chunk.too_long)[:MAX_LISTED]

    @property
    def is_hopeless(self) -> bool:
        """Return whether so many masks are invalid that the rest need not be checked."""
        return len(self.flawed) >= MAX_LISTED

    def judge(self, rows_used: int) -> None:
        """Reject a dataset with all its problems at once.

        Raises:
            DataError: depending on the settings.
        """
        problems = self.log.problems()
        if self.flawed:
            least = "at least " if self.is_hopeless else ""
            problems.append(
                Problem(
                    what=f"{least}{len(self.flawed):,} rows have an invalid loss mask",
                    why="the audit found rows without a supervised token, or with an unsupervised "
                    "end of a turn",
                    remedy="lora-trainer check --show-sample prints rows with their masks; "
                    "then fix the rows, train_on or chat_template",
                )
            )
            problems.extend(listed_problems(self.flawed, len(self.flawed)))
        if self.too_long:
            problems.append(
                Problem(
                    what=f"{self.too_long_total:,} rows are longer than max_seq_length",
                    remedy=f"set max_seq_length: {self.longest} (the longest row), or too_long: "
                    "truncate or drop",
                )
            )
            problems.extend(listed_problems(self.too_long, self.too_long_total))
        if not problems and rows_used == 0:
            reasons = Counter(self.dropped) + self.log.reasons
            problems.append(
                Problem(
                    what="no row is left to train on",
                    why="; ".join(f"{count:,} rows: {reason}" for reason, count in reasons.items()),
                    remedy="raise max_seq_length, or fix the rows",
                )
            )
        if problems:
            raise DataError(problems)


def report_on(dataset: TokenizedDataset, cache: str, processes_restarted: int = 0) -> DataReport:
    """Complete the counts stored with a dataset."""
    lengths = dataset.lengths
    p50, p90, p99 = (int(p) for p in np.percentile(lengths, (50, 90, 99)))
    return DataReport(
        **dataset.report,
        rows_used=len(dataset),
        rows_repeated=len(dataset) - len(np.unique(dataset.row_hashes)),
        tokens=dataset.token_count,
        trained_tokens=int(dataset.supervised_counts.sum(dtype=np.int64)),
        mean_tokens=round(dataset.token_count / len(dataset), 1),
        p50_tokens=p50,
        p90_tokens=p90,
        p99_tokens=p99,
        max_tokens=int(lengths.max()),
        digest=dataset.digest,
        cache=cache,
        processes_restarted=processes_restarted,
    )
