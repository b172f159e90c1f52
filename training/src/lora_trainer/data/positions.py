"""Where tokenized rows stand in their files: found again by what they say.

A cache entry keeps a hash of each row's content, not its line. Reading the sources once more
(50 to 90 us a row) is only worth it where a row has to be named.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .bad_rows import BadRow
from .fingerprint import example_hash
from .formats import to_example
from .instructions import RowError
from .prepare import formatted_rows
from .resolve import SourceSpec


def find_rows(specs: Sequence[SourceSpec], hashes: Collection[int]) -> dict[int, list[str]]:
    """Return, for each row hash, every `file:line` that says the same, in the sources' order.

    Raises:
        TrainerError: a source cannot be read any more.
    """
    positions: dict[int, list[str]] = {}
    for spec, (format, rows) in zip(specs, formatted_rows(specs), strict=True):
        for row in rows:
            if isinstance(row, BadRow):
                continue
            try:
                key = example_hash(to_example(row.value, format, dict(spec.columns)))
            except RowError:
                continue
            if key in hashes:
                positions.setdefault(key, []).append(row.where)
    return positions
