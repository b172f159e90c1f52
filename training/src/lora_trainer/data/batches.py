"""The sampler: which examples make up a step is a pure function of (seed, epoch, step).

A checkpoint stores only the step, and the order does not depend on the number of processes: these
divide a step's examples, they do not choose them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Rows(Protocol):
    """Tokenized examples by index: token ids and trained marks, both of shape (T,)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]: ...


@dataclass(frozen=True)
class Sampler:
    """The order of `rows` examples in steps of `step_examples`, shuffled every epoch.

    An epoch's last step may be smaller; no example is skipped or repeated.
    `rows_of_epoch` chooses an epoch's rows if sources are weighted: always `rows` of them,
    different ones each epoch; without it they are 0 to rows - 1.
    """

    rows: int
    step_examples: int
    seed: int
    rows_of_epoch: Callable[[int], NDArray[np.int64]] | None = None
    # Shuffling a million rows takes 30 ms, so the current epoch is kept.
    _drawn: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of one epoch."""
        return -(-self.rows // self.step_examples)

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return all row indices in the order of an epoch (0 is the first)."""
        if epoch not in self._drawn:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            permutation = np.random.Generator(bits).permutation(self.rows)
            chosen = (
                permutation
                if self.rows_of_epoch is None
                else self.rows_of_epoch(epoch)[permutation]
            )
            self._drawn.clear()
            self._drawn[epoch] = chosen
        return self._drawn[epoch]

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Return the row indices of optimizer step `step` (0 is the first)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.step_examples
        return self.epoch_order(epoch)[start : start + self.step_examples]

    def epoch_at(self, step: int) -> float:
        """Return the number of epochs completed after `step` steps."""
        return step / self.steps_per_epoch


def split_micro_batches(
    rows: Sequence[int] | NDArray[np.int64], examples: int
) -> Iterator[NDArray[np.int64]]:
    """Split a step's rows into micro-batches of at most `examples` rows, in order."""
    array = np.asarray(rows, dtype=np.int64)
    for start in range(0, len(array), examples):
        yield array[start : start + examples]


def cut_by_tokens(
    lengths: Sequence[int], budget: int, *, multiple: int = 1, least: int = 1, is_padded: bool
) -> list[list[int]]:
    """Cut a step into micro-batches of at most `budget` tokens, a longer example alone.

    Returns positions in the step, ascending within a micro-batch, the largest micro-batch first.
    There are `multiple` times n micro-batches, and at least `least`, unless there are fewer
    examples. They are as even as possible; padded ones hold examples of similar length, and their
    padding counts.
    """
    fitting = max(budget, *lengths)
    ranking = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if is_padded:
        pieces = fill_in_order(ranking, dict(enumerate(lengths)), fitting, is_padded=True)
        while len(pieces) < len(lengths) and (len(pieces) % multiple or len(pieces) < least):
            pieces = _with_largest_split(pieces, lengths)
    else:
        count = _rounded_up(max(least, -(-sum(lengths) // fitting)), multiple)
        pieces = _evenly(ranking, lengths, min(count, len(lengths)))
        while max(sum(lengths[i] for i in piece) for piece in pieces) > fitting:
            count += multiple
            pieces = _evenly(ranking, lengths, min(count, len(lengths)))
    return [sorted(piece) for piece in pieces]


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _evenly(ranking: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Give each example, the longest first, to the micro-batch with the fewest tokens."""
    loads = [(0, number) for number in range(count)]
    pieces: list[list[int]] = [[] for _ in range(count)]
    for index in ranking:
        load, number = heapq.heappop(loads)
        pieces[number].append(index)
        heapq.heappush(loads, (load + lengths[index], number))
    return pieces


def fill_in_order(
    ranking: Iterable[int], lengths: Mapping[int, int], budget: int, *, is_padded: bool
) -> list[list[int]]:
    """Fill batches of at most `budget` tokens in the order of length, longest first."""
    pieces: list[list[int]] = [[]]
    tokens = 0
    for index in ranking:
        length = lengths[index]
        if is_padded and pieces[-1]:
            tokens, length = 0, lengths[pieces[-1][0]] * (len(pieces[-1]) + 1)
        if pieces[-1] and tokens + length > budget:
            pieces.append([])
            tokens, length = 0, lengths[index]
        pieces[-1].append(index)
        tokens += length
    return pieces


def _with_largest_split(pieces: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Halve the micro-batch with the most padded tokens, of those with several examples."""
    several = [number for number, piece in enumerate(pieces) if len(piece) > 1]
    most = max(several, key=lambda number: lengths[pieces[number][0]] * len(pieces[number]))
    middle = (len(pieces[most]) + 1) // 2
    halves = [pieces[most][:middle], pieces[most][middle:]]
    return [*pieces[:most], *halves, *pieces[most + 1 :]]


@dataclass(frozen=True)
class RowView:
    """Some rows of a dataset, in the order of `index`, without copying them."""

    rows: Rows
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.rows[int(self.index[position])]
