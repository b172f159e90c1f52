"""How a step is cut into micro-batches of so many tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.data.batches import cut_by_tokens, fill_in_order

lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def tokens(piece, lengths, is_padded):
    own = [lengths[index] for index in piece]
    return len(own) * max(own) if is_padded else sum(own)


@given(lengths_of_rows, st.integers(1, 900), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_every_example_is_in_one_micro_batch_within_the_budget(
    lengths, budget, multiple, least, is_padded
):
    pieces = cut_by_tokens(lengths, budget, multiple=multiple, least=least, is_padded=is_padded)
    assert sorted(index for piece in pieces for index in piece) == list(range(len(lengths)))
    assert all(tokens(p, lengths, is_padded) <= max(budget, *lengths) for p in pieces)
    is_each_alone = len(pieces) == len(lengths)
    assert is_each_alone or (len(pieces) % multiple == 0 and len(pieces) >= least)


def test_short_examples_share_a_micro_batch_and_a_long_one_has_its_own():
    assert cut_by_tokens([5, 90, 5, 5], 40, is_padded=False) == [[1], [0, 2, 3]]


def test_padding_counts():
    lengths = [10, 2, 10, 2]
    assert cut_by_tokens(lengths, 24, is_padded=False) == [[0, 1, 2, 3]]
    assert cut_by_tokens(lengths, 24, is_padded=True) == [[0, 2], [1, 3]]


def test_batches_of_an_evaluation_keep_the_order_of_length():
    lengths = {3: 9, 0: 6, 2: 4, 1: 2}
    assert fill_in_order(lengths, lengths, 10, is_padded=False) == [[3], [0, 2], [1]]
