"""Precedence of sources: the later one wins, also over alternatives to its keys.

Held-out rows come from `eval_dataset` or from `eval_fraction`, and the warmup's length
from `warmup_steps` or from `warmup_ratio`. When a later source sets one of a pair, the other one
from an earlier source is dropped, as the same key would be. Both in one source are kept, and
`conflicts` reports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import Problem
from .layers import Given, Layer

# Each key of a pair, and its neutral value, which displaces nothing.
RIVALS = (
    (("eval_dataset", None), ("eval_fraction", 0)),
    (("warmup_steps", None), ("warmup_ratio", None)),
    (("eval_steps", None), ("evals_per_epoch", 0)),
    (("save_steps", None), ("saves_per_epoch", 0)),
)


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Given], list[Problem]]:
    """Return the winning values (later sources win) and the problems."""
    given = {leaf: value for layer in layers for leaf, value in layer.given.items()}
    rank = {leaf: n for n, layer in enumerate(layers) for leaf in layer.given}
    for pair in RIVALS:
        for (winner, nothing), (loser, _) in (pair, pair[::-1]):
            is_asked = winner in given and given[winner].value != nothing
            if is_asked and loser in given and rank[winner] > rank[loser]:
                del given[loser]
    return given, _find_foreign_held_out(given)


def _find_foreign_held_out(given: Mapping[str, Given]) -> list[Problem]:
    """Refuse the held-out rows that a file names beside another dataset than is trained on."""
    data, held_out = given.get("dataset"), given.get("eval_dataset")
    if data is None or held_out is None or held_out.value is None:
        return []
    if data.origin.kind == "file" or held_out.origin.kind != "file":
        return []
    fraction, own = {
        "environment": ("LORA_TRAINER_EVAL_FRACTION=0.1", "LORA_TRAINER_EVAL_DATASET=FILE"),
        "argument": ("eval_fraction=0.1", 'eval_dataset="FILE"'),
    }.get(data.origin.kind, ("--eval_fraction 0.1", "--eval_dataset FILE"))
    return [
        Problem(
            "eval_dataset belongs to another dataset than the one to train on",
            f"{held_out.location()}; dataset: {data.origin}",
            "its rows would say nothing about your data",
            f"add {fraction} to hold back rows of your own, or {own}",
        )
    ]
