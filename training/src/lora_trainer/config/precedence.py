"""Precedence of sources: the later one wins, also over alternatives to its keys.

Held-out rows come from `eval_dataset` or from `eval_fraction`, and the warmup's length
from `warmup_steps` or from `warmup_ratio`. When a later source sets one of a pair, the other one
from an earlier source is dropped, as the same key would be. Both in one source are kept, and
`conflicts` reports them. The demo's held-out rows are not used for another dataset: a share
of its own rows is held out instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

from ..errors import Problem
from .layers import Given, Layer, Origin

# Each key of a pair, and its neutral value, which displaces nothing.
RIVALS = (
    (("eval_dataset", None), ("eval_fraction", 0)),
    (("warmup_steps", None), ("warmup_ratio", None)),
    (("eval_steps", None), ("evals_per_epoch", 0)),
    (("save_steps", None), ("saves_per_epoch", 0)),
)
DEMO_HELD_OUT = ("demo", "eval.jsonl")  # eval_dataset of the default job, as its path ends
HELD_OUT_SHARE = 0.1


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Given], list[Problem], list[str]]:
    """Return the winning values (later sources win), the problems, and notes."""
    given = {leaf: value for layer in layers for leaf, value in layer.given.items()}
    rank = {leaf: n for n, layer in enumerate(layers) for leaf in layer.given}
    for pair in RIVALS:
        for (winner, nothing), (loser, _) in (pair, pair[::-1]):
            is_asked = winner in given and given[winner].value != nothing
            if is_asked and loser in given and rank[winner] > rank[loser]:
                del given[loser]
    if not _has_foreign_held_out(given):
        return given, [], []
    if PurePath(str(given["eval_dataset"].value)).parts[-2:] == DEMO_HELD_OUT:
        return given, [], _hold_out_own_rows(given)
    return given, [_foreign_held_out(given["dataset"], given["eval_dataset"])], []


def _has_foreign_held_out(given: Mapping[str, Given]) -> bool:
    """Return whether a file names held-out rows beside another dataset than is trained on."""
    data, held_out = given.get("dataset"), given.get("eval_dataset")
    if data is None or held_out is None or held_out.value is None:
        return False
    return data.origin.kind != "file" and held_out.origin.kind == "file"


def _hold_out_own_rows(given: dict[str, Given]) -> list[str]:
    """Hold out rows of the dataset in place of the demo's; return what to print.

    An `eval_fraction` of 0 that the user set stays: then nothing is evaluated.
    """
    demo = given.pop("eval_dataset")
    if "eval_fraction" in given:
        for leaf in ("eval_steps", "eval_generate", "eval_max_new_tokens"):
            if leaf in given and given[leaf].origin.kind == "file":
                del given[leaf]
        return []
    origin = Origin("default", f"in place of eval_dataset in {demo.location()}")
    given["eval_fraction"] = replace(
        demo, leaf="eval_fraction", value=HELD_OUT_SHARE, origin=origin, document=None, pointer=()
    )
    return [
        "a tenth of your rows is held out, because eval_dataset in the config belongs to the demo; "
        "choose with eval_fraction (0: none) or eval_dataset"
    ]


def _foreign_held_out(data: Given, held_out: Given) -> Problem:
    fraction, own = {
        "environment": ("LORA_TRAINER_EVAL_FRACTION=0.1", "LORA_TRAINER_EVAL_DATASET=FILE"),
        "argument": ("eval_fraction=0.1", 'eval_dataset="FILE"'),
    }.get(data.origin.kind, ("--eval_fraction 0.1", "--eval_dataset FILE"))
    return Problem(
        "eval_dataset belongs to another dataset than the one to train on",
        f"{held_out.location()}; dataset: {data.origin}",
        "its rows would say nothing about your data",
        f"add {fraction} to hold back rows of your own, or {own}",
    )
