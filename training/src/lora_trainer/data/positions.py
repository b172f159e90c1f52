"""Find the file and line of tokenized rows by their content hashes.

A cache entry stores a hash of each row's content, not its line. Reading the sources again (50 to 90
us per row) is only worthwhile to name a row in a message.
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
    """Return every `file:line` with the same content for each row hash, in source order.

    Raises:
        TrainerError: a source can no longer be read.
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
