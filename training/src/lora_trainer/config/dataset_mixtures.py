"""Mixtures of datasets in files of TRL and of the alignment handbook.

TRL: `dataset_mixture: {datasets: [{path, name, split, columns}], test_split_size}`. The handbook
writes `id` and `config`, or `dataset_mixer: {NAME: FRACTION}` with `dataset_splits`.
Source: trl/scripts/utils.py, alignment/data.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Problem
from .layers import Given, Origin

KEYS = frozenset({"dataset_mixture", "dataset_mixer", "dataset_splits", "dataset_configs"})
NAMES = {
    "path": "path", "id": "path", "name": "subset", "config": "subset", "split": "split",
    "data_files": "data_files", "weight": "weight", "columns": "",
}  # fmt: skip
SPLITS = ("train", "test")
SPLIT_LIST = "write dataset: [{path: NAME, split: train}, ...]"


def read(given: dict[str, Given], keys: Mapping[str, Any], path: Path) -> list[Problem]:
    """Add the datasets of a file's mixture where no other source names one."""
    key = next((key for key in ("dataset_mixture", "dataset_mixer") if keys.get(key)), "")
    if not key or "dataset" in given:
        return []
    value = keys[key]
    origin = Origin("file", f"{path} /{key}")
    if not isinstance(value, Mapping):
        return [Problem(f"{key} cannot be read", origin.location, "it is no object", SPLIT_LIST)]
    entries, held_out, why = _mixture(value) if key == "dataset_mixture" else _mixer(value, keys)
    if why:
        return [Problem(f"{key} cannot be read", origin.location, why, SPLIT_LIST)]
    given["dataset"] = Given("dataset", entries, origin, path.parent)
    if held_out and not {"eval_dataset", "eval_fraction"} & given.keys():
        leaf = "eval_dataset" if isinstance(held_out, list) else "eval_fraction"
        given[leaf] = Given(leaf, held_out, origin, path.parent)
    return []


def _mixture(value: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any, str]:
    """Return the datasets, the held-out fraction, and why they cannot be taken."""
    entries = []
    for number, entry in enumerate(value.get("datasets") or [], 1):
        if not isinstance(entry, Mapping) or not entry.keys() <= NAMES.keys():
            return [], None, f"entry {number} has keys other than {', '.join(NAMES)}"
        if entry.get("weight", 1) != 1:
            return (
                [],
                None,
                f"entry {number} takes a fraction of the rows: max_samples says how many",
            )
        kept = {NAMES[key]: one for key, one in entry.items() if NAMES[key] and one is not None}
        kept.pop("weight", None)
        files = kept.pop("data_files", None)
        entries.append(kept | ({"path": files} if files else {}))
    return entries, value.get("test_split_size"), "" if entries else "it lists no datasets"


def _mixer(
    value: Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], Any, str]:
    """Return the datasets of all splits with `train` in their name, and those with `test`."""
    splits = keys.get("dataset_splits") or list(SPLITS)
    subsets = keys.get("dataset_configs") or [None] * len(value)
    if not isinstance(splits, list) or not isinstance(subsets, list) or len(subsets) != len(value):
        return [], None, "dataset_splits and dataset_configs are lists, the second one of all names"
    lists: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for (name, fraction), subset in zip(value.items(), subsets, strict=True):
        if fraction != 1:
            why = f"{name} has a fraction of {fraction}: max_samples says how many rows are used"
            return [], None, why
        for split in splits:
            entry = {"path": name, "split": split} | ({"subset": subset} if subset else {})
            for kind in SPLITS:
                if kind in str(split):
                    lists[kind].append(entry)
                    break
    return lists["train"], lists["test"], "" if lists["train"] else "no split is for training"
