"""Handle out-of-memory: smaller batches, then gradient checkpointing.

The loss of a step is normalised over all its targets, so the micro-batch size only affects memory
and time. The step that did not fit is repeated in smaller micro-batches, and the smaller size is
kept for later starts, too (`memory.json`). Imports no torch.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TrainerError
from ..faults import is_out_of_memory, out_of_memory
from ..host.disk import write_json
from ..run_folder import RunFolder
from ..units import size
from .events import Event, MemoryReduced, Warned

START_AGAIN = "--resume never (this run is archived) or another --run_name"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """What a run was cut down to; zero examples: as configured."""

    micro_batch_examples: int = 0
    eval_batch_examples: int = 0
    gradient_checkpointing: bool = False
    micro_batch_tokens: int = 0

    def reasons(
        self, micro_batch_examples: int, eval_batch_examples: int, micro_batch_tokens: int = 0
    ) -> tuple[str, ...]:
        """Say where this is less than the sizes that are configured."""
        kept = []
        if 0 < self.micro_batch_tokens < micro_batch_tokens:
            kept.append(
                f"micro-batches of {self.micro_batch_tokens:,} instead of "
                f"{micro_batch_tokens:,} tokens"
            )
        if 0 < self.micro_batch_examples < micro_batch_examples:
            kept.append(
                f"micro-batches of {self.micro_batch_examples} instead of {micro_batch_examples}"
            )
        if 0 < self.eval_batch_examples < eval_batch_examples:
            kept.append(f"evaluation batches of {self.eval_batch_examples}")
        if self.gradient_checkpointing:
            kept.append("gradient checkpointing")
        if not kept:
            return ()
        return (
            f"this run was out of memory earlier and now uses {', '.join(kept)}; remove "
            f"{RunFolder.memory_limits} from the output folder to try the configured sizes again",
        )


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The sizes that a run uses now; they only become smaller.

    `micro_batch_tokens` 0: micro-batches are cut by examples.
    """

    micro_batch_examples: int
    eval_batch_examples: int
    gradient_checkpointing: bool
    micro_batch_tokens: int = 0
    longest_tokens: int = 0  # of one example, which cannot be cut

    @property
    def limits(self) -> MemoryLimits:
        """Return these sizes as what later starts keep to."""
        return MemoryLimits(
            self.micro_batch_examples,
            self.eval_batch_examples,
            self.gradient_checkpointing,
            self.micro_batch_tokens,
        )

    def text(self) -> str:
        """Return the sizes of a step as a clause."""
        if self.micro_batch_tokens:
            checkpointed = " with gradient checkpointing" if self.gradient_checkpointing else ""
            return f"micro-batches of at most {self.micro_batch_tokens:,} tokens{checkpointed}"
        count = self.micro_batch_examples
        examples = "1 example" if count == 1 else f"{count} examples"
        checkpointed = " and gradient checkpointing" if self.gradient_checkpointing else ""
        return f"micro-batches of {examples}{checkpointed}"


def reduced(sizes: BatchSizes, *, is_evaluation: bool = False) -> BatchSizes | None:
    """Return the next smaller sizes; None where nothing is left to reduce.

    A micro-batch becomes its largest proper divisor, half where it is even: a step's smaller
    micro-batches are then those that the smaller size would have made. A budget of tokens halves,
    down to the longest example: no micro-batch has more tokens then.
    """
    if is_evaluation:
        count = sizes.eval_batch_examples
        return replace(sizes, eval_batch_examples=count // 2) if count > 1 else None
    if sizes.micro_batch_tokens > sizes.longest_tokens:
        halved = max(sizes.micro_batch_tokens // 2, sizes.longest_tokens)
        return replace(sizes, micro_batch_tokens=halved)
    count = sizes.micro_batch_examples
    if count > 1 and not sizes.micro_batch_tokens:
        smaller = max(part for part in range(1, count // 2 + 1) if count % part == 0)
        return replace(sizes, micro_batch_examples=smaller)
    if not sizes.gradient_checkpointing:
        return replace(sizes, gradient_checkpointing=True)
    return None


def sizes_of(plan: Mapping[str, Any]) -> BatchSizes | None:
    """Return the sizes of a plan as events tell it; None where there is no plan yet."""
    try:
        return BatchSizes(
            int(plan["micro_batch_examples"]),
            int(plan["eval_batch_examples"]),
            bool(plan["gradient_checkpointing"]),
            int(plan.get("micro_batch_tokens", 0)),
            int(plan.get("longest_tokens", 0)),
        )
    except (KeyError, TypeError, ValueError):
        return None


def in_pieces(
    items: Sequence[Item],
    most: int,
    work: Callable[[Sequence[Item]], Result],
    *,
    is_divisible: bool = True,
) -> tuple[list[Result], int]:
    """Do `work` on all items, `most` at a time or fewer where memory runs out.

    Returns the results in order, and how many fitted at a time. Where a model is shared by
    ranks, one of them cannot go back alone: the error is raised as it is.

    Raises:
        MemoryKilledError: not even one fits.
    """
    results: list[Result] = []
    start = 0
    while start < len(items):
        piece = items[start : start + most]
        try:
            results.append(work(piece))
        except Exception as error:
            if not is_divisible or not is_out_of_memory(error):
                raise
            if len(piece) == 1:
                raise nothing_fits("one row at a time", str(error)) from error
        else:
            start += len(piece)
            continue
        most = len(piece) // 2
        release()
    return results, most


def nothing_fits(where: str, text: str) -> TrainerError:
    """Return the error of memory that ran out with nothing left to reduce."""
    error = out_of_memory(where, text)
    error.retry = ""
    return error


def release() -> None:
    """Give back what a failed attempt left; call it outside of the `except` block."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def why_nothing_fits(plan: Mapping[str, Any]) -> tuple[str, str]:
    """Return the numbers of a plan that did not fit even at its smallest, and what would fit."""
    needed, limit = plan.get("least_memory_bytes", 0), plan.get("memory_limit_bytes", 0)
    what = "one example at a time with gradient checkpointing"
    # Nothing is counted for a plan with room to spare, unless a smaller one is needed later.
    needs = f"needs about {size(needed)}" if needed else "does not fit"
    why = f"{what} {needs}, and {size(limit)} are available"
    fitting = [str(one) for one in plan.get("smaller_plans", ())]
    if not fitting:
        return why, f"use a machine with more memory than {size(limit)}, or a smaller base model"
    return why, f"{'; or '.join(fitting)}; with it {START_AGAIN}"


def reduction(sizes: BatchSizes, step: int, cause: str) -> list[Event]:
    """Return the events of sizes that became smaller after `step`."""
    return [
        MemoryReduced(
            step=step,
            micro_batch_examples=sizes.micro_batch_examples,
            eval_batch_examples=sizes.eval_batch_examples,
            gradient_checkpointing=sizes.gradient_checkpointing,
            micro_batch_tokens=sizes.micro_batch_tokens,
            cause=cause,
        ),
        Warned(
            message=f"out of memory at step {step + 1}; from now on {sizes.text()}, evaluation "
            f"batches of {sizes.eval_batch_examples}: losses do not change ({cause})"
        ),
    ]


def read_limits(folder: Path) -> MemoryLimits:
    """Return what the folder's run was cut down to; a damaged file is as good as none."""
    try:
        raw = json.loads(RunFolder(folder).memory_limits.read_text(encoding="utf-8"))
        examples, rows = raw["micro_batch_examples"], raw["eval_batch_examples"]
        tokens = raw.get("micro_batch_tokens", 0)
        if not all(type(count) is int and count >= 0 for count in (examples, rows, tokens)):
            return MemoryLimits()
        return MemoryLimits(examples, rows, raw["gradient_checkpointing"] is True, tokens)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return MemoryLimits()


def write_limits(folder: Path, limits: MemoryLimits) -> None:
    """Keep what the folder's run was cut down to, for every later start."""
    write_json(RunFolder(folder).memory_limits, asdict(limits))
