"""What examples begin with alike is in a row once, and every token of theirs is in it."""

from __future__ import annotations

import numpy as np
import pytest

from lora_trainer.data.prefixes import LEAST_TOKENS, saved_tokens, share

random = np.random.Generator(np.random.PCG64(4))
SYSTEM, SHOTS = (random.integers(0, 100, LEAST_TOKENS + more) for more in (4, 9))


def example(*pieces, own=5):
    return np.concatenate([*pieces, random.integers(100, 10_000, own)])


NESTED = [example(SYSTEM, SHOTS), example(own=30), example(SYSTEM, SHOTS), example(SYSTEM)]
REPEATED = [SYSTEM, example(SYSTEM), SYSTEM, SYSTEM[:LEAST_TOKENS]]


def seen(row, token):
    """Return what a token of the row attends to: what comes before it where it is, and itself."""
    numbers = []
    for segment in row.segments:
        if segment.start <= token < segment.stop:
            numbers += range(segment.start, token + 1)
        elif segment.stop <= token < segment.end:
            numbers += range(segment.start, segment.stop)
    return numbers


@pytest.mark.parametrize("examples", [NESTED, REPEATED], ids=["nested", "repeated"])
def test_every_token_sees_its_own_example_up_to_itself_and_nothing_else(examples):
    row = share(examples)
    ids = np.concatenate(examples)
    in_row = ids[row.source]
    numbers = iter(row.row)
    for one in examples:
        for position in range(len(one)):
            number = next(numbers)
            assert in_row[seen(row, number)].tolist() == one[: position + 1].tolist()
            assert row.positions[number] == position


def test_a_prefix_is_computed_once_at_each_level_of_the_tree():
    assert saved_tokens(NESTED) == 2 * len(SYSTEM) + len(SHOTS)
    assert saved_tokens(REPEATED) == 3 * LEAST_TOKENS  # 4 more tokens are too few


def test_a_prefix_too_short_to_pay_is_left_alone():
    short = SYSTEM[: LEAST_TOKENS - 1]
    assert share([example(short), example(short)]) is None
    assert share([SYSTEM]) is None


def test_the_order_of_examples_changes_neither_the_row_nor_what_is_saved():
    one, other = share(NESTED), share(NESTED[::-1])
    assert one.segments == other.segments
    ids = [np.concatenate(examples)[row.source] for examples, row in
           ((NESTED, one), (NESTED[::-1], other))]  # fmt: skip
    assert ids[0].tolist() == ids[1].tolist()
