"""Pass criteria, fixed before any measurement. Change a bound only with a reason in the commit."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SYNCHRONIZATIONS = 2.0  # of the host with the device, an optimizer step
LEAST_OF_PLAN, MOST_OF_PLAN = 0.85, 1.1  # measured peak divided by the plan's estimate
# One rounding to bfloat16 is off by up to 2^-8. Two kernels that round alike differ by less.
BFLOAT16_STEP = 2.0**-8
MORE_THAN_SEGMENTS = 1.5
LOADING_SLACK_BYTES = 64 << 20  # of host memory, beside one shard


@dataclass(frozen=True, slots=True)
class Verdict:
    """A criterion in one phrase, and whether it is met."""

    criterion: str
    is_met: bool


def works(is_finite: bool, answers: int, asked: int) -> Verdict:
    """Judge loss, gradients and generated answers."""
    text = "loss and gradients finite and not zero, every prompt answered"
    return Verdict(text, is_finite and answers == asked)


def as_segments(error: float, error_of_segments: float) -> Verdict:
    """Judge a kernel's error against float32, given that of PyTorch's own, segment by segment."""
    text = "error at most 2^-8, or 1.5 times that of segments"
    bound = max(BFLOAT16_STEP, MORE_THAN_SEGMENTS * error_of_segments)
    return Verdict(text, error <= bound)


def same_bytes(digests: list[str]) -> Verdict:
    """Judge the sha256 of adapters that must not differ."""
    return Verdict("hashes equal", len(set(digests)) == 1 and bool(digests[0]))


def few_synchronizations(each_step: float) -> Verdict:
    """Judge how often the host waits for the device in a step."""
    return Verdict(f"at most {MOST_SYNCHRONIZATIONS:g} a step", each_step <= MOST_SYNCHRONIZATIONS)


def peak_as_planned(peak_bytes: float, planned_bytes: float) -> Verdict:
    """Judge the plan's memory estimate."""
    share = peak_bytes / planned_bytes
    text = f"peak within {LEAST_OF_PLAN} to {MOST_OF_PLAN} of the plan"
    return Verdict(text, LEAST_OF_PLAN <= share <= MOST_OF_PLAN)


def within_one_shard(peak_bytes: int, shard_bytes: int) -> Verdict:
    """Judge the host memory that loading takes."""
    text = f"at most one shard and {LOADING_SLACK_BYTES >> 20} MB of host memory"
    return Verdict(text, peak_bytes <= shard_bytes + LOADING_SLACK_BYTES)
