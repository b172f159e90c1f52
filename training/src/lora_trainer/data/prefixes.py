"""Tokens that examples of a micro-batch begin with alike, laid out so that each is computed once.

A row of the model holds the tree of the examples' common beginnings, depth first: a system prompt,
then what follows it in each example, which may begin alike again. The order of the examples does
not matter to a summed loss.

Legend: T tokens of all examples, R tokens of the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A beginning of fewer tokens is computed for each example: to share it would not save time.
LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of a row, which those from `stop` to `end` continue."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A micro-batch whose common beginnings are there once.

    `source` names for each of the R tokens its number among the T of all examples, `row` for each
    of the T its number among the R; `positions` (R) count from an example's first token.
    """

    segments: tuple[Segment, ...]
    source: NDArray[np.int64]
    positions: NDArray[np.int64]
    row: NDArray[np.int64]


def share(examples: Sequence[NDArray[np.int64]]) -> SharedRow | None:
    """Lay examples out as a tree of their beginnings; None where they begin differently."""
    if len(examples) < 2:
        return None
    keys = [ids.astype(">u4").tobytes() for ids in examples]
    ranking = sorted(range(len(examples)), key=lambda index: (keys[index], index))
    ordered = [examples[index] for index in ranking]
    alike = [_common(one, other) for one, other in itertools.pairwise(ordered)]
    if max(alike) < LEAST_TOKENS:
        return None
    starts = np.cumsum([0, *(len(ids) for ids in examples)])
    tree = _Tree(alike, [int(starts[index]) for index in ranking], [len(ids) for ids in ordered])
    tree.grow(0, len(ordered), 0, [])
    row = np.empty(int(starts[-1]), dtype=np.int64)
    for index, path in zip(ranking, tree.paths, strict=True):
        row[starts[index] : starts[index + 1]] = np.concatenate(path)
    return SharedRow(
        tuple(tree.segments), np.concatenate(tree.source), np.concatenate(tree.positions), row
    )


def saved_tokens(examples: Sequence[NDArray[np.int64]]) -> int:
    """Return how many tokens of the examples are not computed again."""
    row = share(examples)
    return 0 if row is None else len(row.row) - len(row.source)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return how many tokens two examples begin with alike."""
    length = min(len(one), len(other))
    (differing,) = np.nonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


class _Tree:
    """Grows the segments of examples in lexical order.

    `alike` counts the tokens that neighbours begin with alike, `starts` and `lengths` say where
    each example is among the T tokens.
    """

    def __init__(self, alike: list[int], starts: list[int], lengths: list[int]) -> None:
        self._alike, self._starts, self._lengths = alike, starts, lengths
        self._tokens = 0
        self.segments: list[Segment] = []
        self.source: list[NDArray[np.int64]] = []
        self.positions: list[NDArray[np.int64]] = []
        self.paths: list[list[NDArray[np.int64]]] = []

    def grow(self, first: int, end: int, depth: int, path: list[NDArray[np.int64]]) -> None:
        """Add examples `first` to `end`; `path` are their first `depth` tokens in the row."""
        if end - first == 1:
            self.paths.append([*path, self._add(first, depth, self._lengths[first])])
            return
        borders = [
            index
            for index in range(first + 1, end)
            if self._alike[index - 1] < depth + LEAST_TOKENS
        ]
        if borders:
            for one, next_one in zip([first, *borders], [*borders, end], strict=True):
                self.grow(one, next_one, depth, path)
            return
        common = min(self._alike[first : end - 1])
        number = len(self.segments)
        shared = self._add(first, depth, common)
        self.grow(first, end, common, [*path, shared])
        segment = self.segments[number]
        self.segments[number] = Segment(segment.start, segment.stop, self._tokens)

    def _add(self, example: int, start: int, stop: int) -> NDArray[np.int64]:
        """Add tokens of an example to the row; return their numbers there."""
        before, self._tokens = self._tokens, self._tokens + stop - start
        if stop > start:
            self.segments.append(Segment(before, self._tokens, self._tokens))
        self.source.append(self._starts[example] + np.arange(start, stop))
        self.positions.append(np.arange(start, stop))
        return np.arange(before, self._tokens)
