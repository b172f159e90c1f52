"""Precedence of sources: the later one wins, also over alternatives to its keys.

Held-out rows come from `eval_dataset` or from `eval_fraction`, and the warmup's length
from `warmup_steps` or from `warmup_ratio`. When a later source sets one of a pair, the other one
from an earlier source is dropped, as the same key would be. Both in one source are kept, and
`conflicts` reports them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layers import Given, Layer

# Each key of a pair, and its neutral value, which displaces nothing.
RIVALS = (
    (("eval_dataset", None), ("eval_fraction", 0)),
    (("warmup_steps", None), ("warmup_ratio", None)),
    (("eval_steps", None), ("evals_per_epoch", 0)),
    (("save_steps", None), ("saves_per_epoch", 0)),
)
# Settings for the file's held-out rows, dropped together with them.
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
    """Return the winning values and warnings; later sources take precedence."""
    given = {leaf: value for layer in layers for leaf, value in layer.given.items()}
    rank = {leaf: n for n, layer in enumerate(layers) for leaf in layer.given}
    for pair in RIVALS:
        for (winner, nothing), (loser, _) in (pair, pair[::-1]):
            is_asked = winner in given and given[winner].value != nothing
            if is_asked and loser in given and rank[winner] > rank[loser]:
                del given[loser]
    return given, _drop_strange_held_out(given)


def _drop_strange_held_out(given: dict[str, Given]) -> list[str]:
    """Drop a file's eval_dataset when another source replaces its dataset.

    Those rows say nothing about the data named on the command line or in the environment.
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
        f"eval_dataset of {file} is ignored because dataset is set {giver}: use --eval_dataset or "
        "--eval_fraction"
    ]
