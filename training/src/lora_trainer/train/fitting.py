"""Fit steps and evaluations into the available memory.

After an out-of-memory error the step is repeated in smaller micro-batches: gradients are cleared,
every micro-batch seeds its own dropout, and the optimizer has not stepped yet. The smaller sizes
are reported, kept for later starts, and agreed on by all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.batches import Rows, cut_by_tokens, split_micro_batches
from ..faults import is_out_of_memory
from ..model.compat import enable_checkpointing
from ..model.forward import CausalLM
from ..model.ranks import Ranks, seed_of
from ..plan import Plan
from ..run.events import Event, RankFigures
from ..run.memory_limits import BatchSizes, MemoryLimits, nothing_fits, reduced, reduction, release
from . import evaluate

# More micro-batches than a step has, so that pieces of them have numbers of their own.
MOST_PIECES = 1 << 20
# Rows of a micro-batch, its number in the step, and its weight.
Piece = tuple[NDArray[np.int64], int, float]


class Fitting:
    """The batch sizes of a run as its loop uses them."""

    def __init__(
        self,
        plan: Plan,
        causal: CausalLM,
        ranks: Ranks,
        emit: Callable[[Event], None],
        keep: Callable[[MemoryLimits], None],
    ) -> None:
        self.sizes = BatchSizes(
            plan.micro_batch_examples,
            plan.eval_batch_examples,
            plan.gradient_checkpointing,
            # Ranks on machines of different size cut a step alike.
            ranks.least(plan.micro_batch_tokens),
            plan.longest_tokens,
        )
        self._multiple = plan.micro_batch_multiple
        self._causal = causal
        self._ranks = ranks
        self._emit = emit
        self._keep = keep

    def cut(self, rows: Rows, step_rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut a step's rows into micro-batches, on every rank alike."""
        sizes = self.sizes
        if not sizes.micro_batch_tokens:
            return list(split_micro_batches(step_rows, sizes.micro_batch_examples))
        return self._cut(rows, step_rows, self._multiple, self._ranks.count)

    def _cut(
        self, rows: Rows, step_rows: NDArray[np.int64], multiple: int = 1, least: int = 1
    ) -> list[NDArray[np.int64]]:
        pieces = cut_by_tokens(
            [len(rows[int(row)][0]) for row in step_rows],
            self.sizes.micro_batch_tokens,
            multiple=multiple,
            least=least,
            is_padded=self._causal.packed is None,
        )
        return [step_rows[positions] for positions in pieces]

    def accumulate(
        self,
        rows: Rows,
        micro_batches: Sequence[Piece],
        factor: float,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        step: int,
    ) -> Tensor:
        """Add up loss and gradients, times `factor`, of this rank's part of the step after `step`.

        Raises:
            MemoryKilledError: one example at a time does not fit.
        """
        before = self.sizes
        while True:
            try:
                pieces = self._pieces(rows, micro_batches, before)
                return self._accumulate(rows, pieces, factor, seed, step)
            except Exception as error:
                # Ranks that share a model wait for this one in the middle of it.
                if self._causal.is_sharded or not is_out_of_memory(error):
                    raise
                cause = _first_line(error)
            # Only here is the traceback gone, which holds what the attempt had allocated.
            optimizer.zero_grad(set_to_none=True)
            release()
            smaller = reduced(self.sizes)
            if smaller is None:
                raise nothing_fits(f"step {step + 1}, {self.sizes.text()}", cause)
            self._adopt(smaller, step, cause)

    def _accumulate(
        self, rows: Rows, pieces: Iterator[Piece], factor: float, seed: int, step: int
    ) -> Tensor:
        summed = torch.zeros((), device=self._causal.device)
        for indices, number, weight in pieces:
            # Dropout follows from the place in the step, whoever computes it.
            torch.manual_seed(seed_of(seed, step, number))
            loss = self._causal.loss(evaluate.take(rows, indices), weight * factor)
            loss.backward()
            summed += loss.detach()
        return summed

    def _pieces(
        self, rows: Rows, micro_batches: Sequence[Piece], before: BatchSizes
    ) -> Iterator[Piece]:
        """Cut micro-batches, which were cut to the sizes `before`, to the present sizes.

        Those cut by examples are numbered as if the whole step had been cut so from the beginning.
        """
        fitting, size = self.sizes.micro_batch_examples, before.micro_batch_examples
        for indices, number, weight in micro_batches:
            if self.sizes.micro_batch_tokens == before.micro_batch_tokens > 0:
                yield indices, number, weight
            elif before.micro_batch_tokens:
                for position, piece in enumerate(self._cut(rows, indices)):
                    yield piece, (number + 1) * MOST_PIECES + position, weight
            else:
                for position, piece in enumerate(split_micro_batches(indices, fitting)):
                    yield piece, number * (size // fitting) + position, weight

    def measured(self) -> dict[str, Any]:
        """Return the sizes for this rank's figures, by which the others learn of them."""
        return {
            "micro_batch_examples": self.sizes.micro_batch_examples,
            "micro_batch_tokens": self.sizes.micro_batch_tokens,
            "gradient_checkpointing": int(self.sizes.gradient_checkpointing),
        }

    def agree(self, measured: Sequence[RankFigures], step: int) -> None:
        """Take over the smallest sizes of all ranks after the step that followed `step`."""
        smallest = replace(
            self.sizes,
            micro_batch_examples=min(one.micro_batch_examples for one in measured),
            micro_batch_tokens=min(one.micro_batch_tokens for one in measured),
            gradient_checkpointing=any(one.gradient_checkpointing for one in measured),
        )
        if smallest != self.sizes:
            self._adopt(smallest, step, "out of memory on another rank")

    def agree_on_evaluation(self, batch_examples: int, step: int) -> None:
        """Take over how many rows fitted at a time; every rank must ask."""
        fitting = self._ranks.least(batch_examples)
        if 0 < fitting < self.sizes.eval_batch_examples:
            smaller = replace(self.sizes, eval_batch_examples=fitting)
            self._adopt(smaller, step, "out of memory in an evaluation")

    def _adopt(self, sizes: BatchSizes, step: int, cause: str) -> None:
        """Use smaller sizes from now on; rank 0 reports and keeps them."""
        if sizes.gradient_checkpointing and not self.sizes.gradient_checkpointing:
            enable_checkpointing(self._causal.inner)
        self.sizes = sizes
        if self._ranks.is_first:
            self._keep(sizes.limits)
            for event in reduction(sizes, step, cause):
                self._emit(event)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
