"""Which source wins: the later one, also where it gives a value's rival.

Held-out rows come from `eval_dataset` or from `eval_fraction`, and the warmup's length
from `warmup_steps` or from `warmup_ratio`. When a later source gives one of a pair, the
other one of an earlier source gives way, as the same key would. Both of one source stay,
for `conflicts` to complain about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layers import Given, Layer

# Each of a pair, and the value with which it asks for nothing and so displaces nothing.
RIVALS = (
    (("eval_dataset", None), ("eval_fraction", 0)),
    (("warmup_steps", None), ("warmup_ratio", None)),
    (("eval_steps", None), ("evals_per_epoch", 0)),
    (("save_steps", None), ("saves_per_epoch", 0)),
)
# What a file asks of its held-out rows has no subject once they are left out.
NEEDS_HELD_OUT = (
    "early_stopping_patience",
    "early_stopping_threshold",
    "eval_generate",
    "eval_max_new_tokens",
    "eval_steps",
    "evals_per_epoch",
    "load_best_model_at_end",
)


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Given], list[str]]:
    """Return the winning values of sources, the later ones first in rank, and warnings."""
    given = {leaf: value for layer in layers for leaf, value in layer.given.items()}
    rank = {leaf: n for n, layer in enumerate(layers) for leaf in layer.given}
    for pair in RIVALS:
        for (winner, nothing), (loser, _) in (pair, pair[::-1]):
            is_asked = winner in given and given[winner].value != nothing
            if is_asked and loser in given and rank[winner] > rank[loser]:
                del given[loser]
    return given, _drop_strange_held_out(given)


def _drop_strange_held_out(given: dict[str, Given]) -> list[str]:
    """Leave out the held-out rows that a file names beside another dataset than is trained on.

    They would say nothing about the data that the command line or the environment names.
    """
    data, held_out = given.get("dataset"), given.get("eval_dataset")
    if data is None or held_out is None or held_out.value is None:
        return []
    if data.origin.kind == "file" or held_out.origin.kind != "file":
        return []
    del given["eval_dataset"]
    fraction = given.get("eval_fraction")
    if fraction is None or fraction.value == 0:
        for leaf in NEEDS_HELD_OUT:
            if leaf in given and given[leaf].origin.kind == "file":
                del given[leaf]
    file = Path(held_out.document.name).name if held_out.document else held_out.origin.location
    kind = data.origin.kind
    givers = {"environment": "in the environment", "argument": "as an argument"}
    giver = givers.get(kind, "on the command line")
    return [
        f"eval_dataset of {file} is left out, since dataset is given {giver}: "
        "name --eval_dataset or --eval_fraction"
    ]
