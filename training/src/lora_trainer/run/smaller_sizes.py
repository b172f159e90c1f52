"""How a plan cuts a step into micro-batches, also after memory ran out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import events


def with_sizes(plan: Mapping[str, Any], event: events.MemoryReduced) -> Mapping[str, Any]:
    """Return the plan with the sizes that a run goes on with after memory ran out."""
    smaller = dict(plan) | {
        "micro_batch_examples": event.micro_batch_examples,
        "micro_batch_tokens": event.micro_batch_tokens,
        "eval_batch_examples": event.eval_batch_examples,
        "gradient_checkpointing": event.gradient_checkpointing,
    }
    return recounted(smaller)


def recounted(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan with what follows from the sizes of its micro-batches."""
    processes = max(1, int(plan.get("processes", 1)))
    examples = int(plan.get("step_examples", 0))
    batches = -(-examples // max(1, int(plan["micro_batch_examples"])))
    counted = dict(plan) | {
        "micro_batches": -(-batches // processes),
        "step_micro_batches": batches,
    }
    if tokens := int(plan.get("micro_batch_tokens", 0)):
        multiple = max(1, int(plan.get("micro_batch_multiple", 1)))
        fewest = max(processes, -(-int(plan.get("step_tokens", 0)) // tokens))
        counted["step_micro_batches"] = min(examples, -(-fewest // multiple) * multiple)
    return counted | {"batch": batch_text(counted)}


def batch_text(plan: Mapping[str, Any]) -> str:
    """Return the factors of a step and their product: `4 per device x 2 accumulated x ...`."""
    per_device, accumulated = plan["micro_batch_examples"], plan["micro_batches"]
    processes, examples = plan.get("processes", 1), plan.get("step_examples", 0)
    factors = (
        f"{per_device} per device x {accumulated} accumulated x "
        f"{'1 process' if processes == 1 else f'{processes} processes'}"
    )
    is_even = per_device * accumulated * processes == examples
    product = "1 example" if examples == 1 else f"{examples} examples"
    text = f"{factors} = {product}" if is_even else f"{product}, at most {factors}"
    tokens = int(plan.get("micro_batch_tokens", 0))
    if not tokens:
        return text
    count = plan.get("step_micro_batches", 0)
    batches = "1 micro-batch" if count == 1 else f"{count} micro-batches"
    return f"{text}, in about {batches} of up to {tokens:,} tokens"
