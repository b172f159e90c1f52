"""Find configuration changes that fit into memory if one example at a time does not; no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config.schema import Config
from ..memory_estimate import (
    Count,
    DataProfile,
    ModelSize,
    Partition,
    estimate_memory_bytes,
    uncounted,
)
from ..plan import Plan
from ..run.memory_limits import BatchSizes, reduced
from ..units import size

# A run that is to need less of its memory looks for smaller plans only once it runs out.
TIGHT = 0.5
# A smaller plan must leave some room to what the estimate does not know of.
ROOM = 0.9
LEAST_LENGTH = 32  # no shorter max_seq_length is proposed


def is_tight(plan: Plan) -> bool:
    """Return whether running out of memory is likely, or would leave nothing to reduce."""
    sizes = BatchSizes(
        plan.micro_batch_examples,
        plan.eval_batch_examples,
        plan.gradient_checkpointing,
        plan.micro_batch_tokens,
        plan.longest_tokens,
    )
    if plan.estimated_memory_bytes > TIGHT * plan.memory_limit_bytes:
        return True
    return reduced(sizes) is None or reduced(sizes, is_evaluation=True) is None


def with_smaller_plans(
    plan: Plan,
    config: Config,
    model_size: ModelSize,
    data: DataProfile,
    count: Count = uncounted,
) -> Plan:
    """Return the plan with the changes that would fit, and the memory that each is to need.

    When one example with gradient checkpointing runs out of memory, the estimate for it is too
    low or above the limit: a change has to stay below both.
    """
    partition = Partition(
        plan.processes,
        plan.parallelism,
        micro_batch=1,
        eval_batch=1,
        accumulates=plan.step_examples > plan.processes,
        is_on_gpu=plan.device != "cpu",
    )

    def estimate(option: Mapping[str, Any]) -> int:
        longest = min(data.longest, option.get("max_seq_length", data.longest))
        use_4bit = option.get("use_4bit", config.model.use_4bit)
        model = config.model.model_copy(update={"use_4bit": use_4bit})
        return estimate_memory_bytes(
            config.model_copy(update={"model": model}),
            model_size,
            data.cut(longest),
            plan.precision,
            has_checkpointing=True,
            partition=partition,
            count=count,
        )

    least = estimate({})
    room = ROOM * min(plan.memory_limit_bytes, least)
    lengths = (1 << power for power in range((data.longest - 1).bit_length() - 1, 0, -1))
    shorter = ({"max_seq_length": length} for length in lengths if length >= LEAST_LENGTH)
    options: list[dict[str, Any]] = [next((o for o in shorter if estimate(o) <= room), {})]
    may_quantize = config.lora.init_lora_weights is True and not config.model.use_8bit
    if may_quantize and importlib.util.find_spec("bitsandbytes") is not None:
        options.append({"use_4bit": True})
    fitting = tuple(
        f"{_as_options(option)} needs about {size(estimate(option))}"
        for option in options
        if option and estimate(option) <= room
    )
    return replace(plan, least_memory_bytes=least, smaller_plans=fitting)


def _as_options(option: Mapping[str, Any]) -> str:
    texts = {key: "true" if value is True else str(value) for key, value in option.items()}
    return " ".join(f"--{key} {text}" for key, text in texts.items())
