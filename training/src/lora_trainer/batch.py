"""The batch of a run: the examples of a step, and the tokens of a micro-batch. Pure.

Both are decided when a run begins and belong to it from then on (`RunBatch`): checkpoints carry
them in the run's identity, so that a resumed run has the same global batches, cut in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config.schema import TrainingSection
from .machine import Device

# More tokens in a micro-batch make a step no faster. Measured: on a CPU in
# docs/decisions/0027-the-batch.md, on a GPU in docs/decisions/0025-the-first-runs-on-a-gpu.md.
EFFICIENT_TOKENS: dict[Device, int] = {"cpu": 1024, "cuda": 8192}
# Ranks exchange the budget as float32, which holds whole numbers up to this one exactly.
MOST_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class RunBatch:
    """What a run keeps of its batch; zeros: it has not begun.

    A step's micro-batches are `multiple` times n, the number of processes that the run began with.
    `tokens` is the budget of a micro-batch; 0: it is cut by examples.
    """

    examples: int = 0
    multiple: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        if not self.tokens:  # as versions that cut by examples alone wrote it
            return str(self.examples)
        return f"{self.examples}.{self.multiple}.{self.tokens}"

    @staticmethod
    def parse(text: str) -> RunBatch:
        """Read it back; one that has not begun where the text is something else."""
        numbers = text.split(".")
        if len(numbers) not in (1, 3) or not all(
            one.isdecimal() and len(one) < 13 for one in numbers
        ):
            return NOT_BEGUN
        return RunBatch(*map(int, numbers))


NOT_BEGUN = RunBatch()


def fresh_step(training: TrainingSection, processes: int) -> int:
    """Return the examples of a step of a run that begins with that many processes."""
    accumulated = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return training.train_batch_size or accumulated * processes


def run_batch(
    training: TrainingSection, begun: RunBatch, processes: int, longest: int, device: Device
) -> RunBatch:
    """Return the batch of a run: as it began, or of one that begins now."""
    if begun.examples:
        return begun
    return RunBatch(fresh_step(training, processes), processes, _budget(training, longest, device))


def _budget(training: TrainingSection, longest: int, device: Device) -> int:
    """Return the tokens of a micro-batch.

    Unless set, they are no more than per_device_train_batch_size of the longest rows have, which
    micro-batches cut by examples may have, too.
    """
    asked = training.max_tokens_per_micro_batch
    if asked != "auto":
        return min(asked, MOST_TOKENS)
    most = training.per_device_train_batch_size * longest
    return max(longest, min(EFFICIENT_TOKENS[device], most))


def batch_reasons(training: TrainingSection, batch: RunBatch, processes: int) -> tuple[str, ...]:
    """Say where a step is not what a new run's would be, and where processes are idle."""
    reasons = []
    if batch.examples != fresh_step(training, processes):
        count = "1 process" if processes == 1 else f"{processes} processes"
        reasons.append(
            f"a step keeps the {batch.examples} examples that this run began with; a new run with "
            f"{count} would have {fresh_step(training, processes)}"
        )
    asked = training.per_device_train_batch_size
    if batch.examples < processes:
        reasons.append(
            f"{processes - batch.examples} of {processes} processes have nothing to do: a step "
            f"has {batch.examples} examples; --nproc {batch.examples} is enough"
        )
    elif processes > math.ceil(batch.examples / asked) and not batch.tokens:
        reasons.append(
            f"micro-batches have {-(-batch.examples // processes)} instead of {asked} examples, "
            f"so that {processes} processes can share a step of {batch.examples}"
        )
    return tuple(reasons)


def smaller_budgets(tokens: int, longest: int, device: Device) -> list[int]:
    """Return the budgets to try where memory is short, largest first.

    Below a quarter of what is efficient, gradient checkpointing costs less time.
    """
    least = max(longest, EFFICIENT_TOKENS[device] // 4)
    budgets = [tokens]
    while budgets[-1] > least:
        budgets.append(max(budgets[-1] // 2, least))
    return budgets
