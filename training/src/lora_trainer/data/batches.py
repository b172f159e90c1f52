"""The sampler: which examples make up a step is a pure function of (seed, epoch, step).

A checkpoint stores only the step, and the order does not depend on the number of processes: these
divide a step's examples, they do not choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class RowView:
    """Some rows of a dataset, in the order of `index`, without copying them."""

    rows: Rows
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.rows[int(self.index[position])]
