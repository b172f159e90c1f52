"""Whether a run computes the tokens that its examples begin with alike once.

A micro-batch shares what its own examples have in common, so the savings are counted in the
micro-batches of the first steps, as they will be trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..config.schema import TrainingSection
from ..data import prefixes
from ..data.batches import Rows, Sampler
from ..model import probe, sizes
from ..model.forward import CausalLM
from ..model.ranks import Ranks
from ..plan import Plan
from .fitting import Fitting

# Less than this of all tokens is not worth the proof, which takes a second.
LEAST_FRACTION = 0.02
COUNTED_TOKENS = 1 << 20


def share_prefixes(
    causal: CausalLM,
    training: TrainingSection,
    plan: Plan,
    sampler: Sampler,
    rows: Rows,
    ranks: Ranks,
) -> Plan:
    """Have `causal` share prefixes where that saves enough and is exact; return the plan."""
    if training.share_prefix is False:
        return plan
    saved, tokens, steps = _count(
        Fitting(plan, causal, ranks, lambda _: None, lambda _: None), plan, sampler, rows
    )
    if ranks.is_any(saved < LEAST_FRACTION * tokens):
        return plan
    counted = "the first step" if steps == 1 else f"the first {steps:,} steps"
    repeated = f"{saved:,} of {tokens:,} tokens ({saved / tokens:.0%}) of {counted}"
    why = _limit(causal) or probe.verify_sharing(causal, ranks.is_any)
    if why:
        return replace(plan, shared_prefix=f"{repeated} repeat a prefix and are computed: {why}")
    return replace(plan, shared_prefix=f"{repeated} repeat a prefix, which is computed once")


def _count(fitting: Fitting, plan: Plan, sampler: Sampler, rows: Rows) -> tuple[int, int, int]:
    """Return the tokens that sharing saves in the first steps, all of their tokens, and the steps.

    They are at most an epoch.
    """
    saved = tokens = steps = 0
    while steps < min(sampler.steps_per_epoch, plan.total_steps) and tokens < COUNTED_TOKENS:
        for indices in fitting.cut(rows, sampler.step_rows(steps)):
            examples = [rows[int(index)][0] for index in indices]
            saved += prefixes.saved_tokens(examples)
            tokens += sum(len(ids) for ids in examples)
        steps += 1
    return saved, tokens, steps


def _limit(causal: CausalLM) -> str:
    """Return why this model cannot share prefixes in training; empty where it can."""
    if causal.packed is None:
        return "examples are padded"
    if causal.kinds_apart:
        return f"one example at a time: {', '.join(sorted(causal.kinds_apart))}"
    if not causal.device.startswith("cpu"):
        return "prefixes are shared on a CPU only"
    if _has_dropout(causal.model):
        return "with dropout, each example drops numbers of its own"
    return ""


def _has_dropout(model: Any) -> bool:
    """Tell whether training drops numbers anywhere, by a module or as the configuration says."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    values = vars(sizes.text_config(model.config)).items()
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in values)
