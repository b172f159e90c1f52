"""Choosing rows: no duplicate leaks into evaluation, weights hold, nothing depends on order."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.data.split import epoch_rows, rows_not_in, split_rows
from lora_trainer.errors import DataError

hashes = st.lists(st.integers(0, 12), min_size=2, max_size=60).map(
    lambda values: np.array(values, dtype=np.uint64)
)


@given(row_hashes=hashes, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_no_duplicate_ever_stands_on_both_sides(row_hashes, fraction, seed):
    try:
        train, held = split_rows(row_hashes, fraction, seed)
    except DataError:
        assert len(set(row_hashes.tolist())) == 1
        return
    assert len(train)
    assert len(held)
    assert not set(row_hashes[train].tolist()) & set(row_hashes[held].tolist())
    assert sorted([*train, *held]) == list(range(len(row_hashes)))


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    row_hashes = np.arange(1000, dtype=np.uint64) * np.uint64(7919)
    _, held = split_rows(row_hashes, 0.1, 3)
    _, held_reversed = split_rows(row_hashes[::-1], 0.1, 3)
    assert set(row_hashes[held]) == set(row_hashes[::-1][held_reversed])
    assert len(held) == 100


def test_another_seed_holds_out_other_rows():
    row_hashes = np.arange(1000, dtype=np.uint64)
    assert set(split_rows(row_hashes, 0.1, 0)[1]) != set(split_rows(row_hashes, 0.1, 1)[1])


def test_rows_not_in_compares_by_content():
    row_hashes = np.array([5, 6, 7], dtype=np.uint64)
    assert rows_not_in(row_hashes, np.array([0, 2]), np.array([7], dtype=np.uint64)).tolist() == [0]


def test_weights_repeat_and_thin_out_the_rows_of_each_source():
    row_hashes = np.zeros(300, dtype=np.uint64)
    sources = np.repeat(np.array([0, 1, 2], dtype=np.uint16), 100)
    weights = [2.25, 1.0, 0.5]
    rows = epoch_rows(row_hashes, sources, weights, np.arange(300), epoch=0)
    counts = Counter(sources[rows].tolist())
    assert counts == {0: 225, 1: 100, 2: 50}
    assert set(Counter(rows[sources[rows] == 0].tolist()).values()) == {2, 3}


def test_a_thinned_source_shows_other_rows_in_the_next_epoch():
    row_hashes = np.arange(100, dtype=np.uint64)
    sources = np.zeros(100, dtype=np.uint16)
    first, again, second = (
        epoch_rows(row_hashes, sources, [0.5], np.arange(100), epoch).tolist()
        for epoch in (0, 0, 1)
    )
    assert first == again != second
