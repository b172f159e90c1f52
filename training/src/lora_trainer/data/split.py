"""Choose rows by index: evaluation rows without leaks, and weighted epochs.

Rows are never copied. All choices depend only on the hashes of the rows' content, so they do not
change with the order of rows, the machine or the process count, and rows with the same content stay
together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Index = NDArray[np.int64]


def split_rows(
    row_hashes: NDArray[np.uint64], eval_fraction: float, seed: int = 0
) -> tuple[Index, Index]:
    """Return the rows to train on and the rows to evaluate on, both in row order.

    Raises:
        DataError: all rows are the same.
    """
    if eval_fraction == 0:
        return np.arange(len(row_hashes)), np.arange(0)
    distinct, counts = np.unique(row_hashes, return_counts=True)
    if len(distinct) < 2:
        raise DataError.of(
            "eval_fraction needs at least two different rows",
            why=f"the dataset has {len(row_hashes)} rows, all with the same content",
            remedy="set eval_fraction: 0, or use an eval_dataset",
        )
    ranking = np.argsort(_mixed(distinct, seed), kind="stable")
    taken = np.cumsum(counts[ranking])
    wanted = max(1, round(len(row_hashes) * eval_fraction))
    groups = min(int(np.searchsorted(taken, wanted)) + 1, len(distinct) - 1)
    is_eval = np.isin(row_hashes, distinct[ranking[:groups]])
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def rows_not_in(
    row_hashes: NDArray[np.uint64], index: Index, other_hashes: NDArray[np.uint64]
) -> Index:
    """Return the rows of `index` whose content is not in another dataset."""
    return index[~np.isin(row_hashes[index], other_hashes)]


def epoch_rows(
    row_hashes: NDArray[np.uint64],
    sources: NDArray[np.uint16],
    weights: Sequence[float],
    index: Index,
    epoch: int,
    seed: int = 0,
) -> Index:
    """Return the rows of an epoch: each source's rows `weight` times, in row order.

    A weight of 2.25 uses every row of a source twice, and a quarter of them (a different one each
    epoch) a third time.
    """
    if all(weight == 1 for weight in weights):
        return index
    drawn: list[Index] = []
    for source, weight in enumerate(weights):
        rows = index[sources[index] == source]
        whole = int(weight)
        drawn.extend([rows] * whole)
        count = round((weight - whole) * len(rows))
        if count:
            # The row number distinguishes rows with the same content.
            keys = row_hashes[rows] ^ _mixed(rows.astype(np.uint64), 0)
            chosen = np.argsort(_mixed(keys, seed * 1_000_003 + epoch + 1), kind="stable")[:count]
            drawn.append(rows[chosen])
    return np.sort(np.concatenate(drawn)) if drawn else index[:0]


def _mixed(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return pseudo-random 64-bit numbers that are a function of value and seed.

    Source: the finalizer of splitmix64, S. Vigna, https://prng.di.unimi.it/splitmix64.c
    """
    step = np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % (1 << 64))
    mixed = values + step
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result
