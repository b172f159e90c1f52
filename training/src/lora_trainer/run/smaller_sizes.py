"""The sizes of a plan after memory ran out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import events


def with_sizes(plan: Mapping[str, Any], event: events.MemoryReduced) -> Mapping[str, Any]:
    """Return the plan with the sizes that a run goes on with after memory ran out."""
    processes = max(1, int(plan.get("processes", 1)))
    examples = int(plan.get("step_examples", 0))
    batches = -(-examples // max(1, event.micro_batch_examples))
    return dict(plan) | {
        "micro_batch_examples": event.micro_batch_examples,
        "micro_batches": -(-batches // processes),
        "eval_batch_examples": event.eval_batch_examples,
        "gradient_checkpointing": event.gradient_checkpointing,
    }
