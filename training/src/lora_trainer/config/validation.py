"""Validate values against the schema: every error becomes a problem with its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import Problem
from .compatibility import DATASETS
from .constraints import choices_of, exceeded_limit, expectation, keys_at, spec_at
from .dataset_entries import LIST_FORM
from .layers import Given, did_you_mean, given_text
from .literal import accepts, from_text
from .schema import SECRET_KEYS
from .sections import leaf_sections, sections
from .text import Pointer, shown_key

Errors = list[tuple[Pointer, str]]  # the part of the value, and pydantic's name for its type


def find_misfits(given: Mapping[str, Given]) -> dict[str, list[Problem]]:
    """Return the problems of each leaf whose value is invalid."""
    misfits: dict[str, list[Problem]] = {}
    for name, kind in sections().items():
        values = {leaf: g.value for leaf, g in given.items() if leaf_sections()[leaf] == name}
        try:
            kind.model_validate(values)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
            for leaf in dict.fromkeys(str(detail["loc"][0]) for detail in details):
                errors = [
                    (_inner_path(values[leaf], detail["loc"][1:]), detail["type"])
                    for detail in details
                    if detail["loc"][0] == leaf
                ]
                misfits[leaf] = _problems(given[leaf], errors)
    return misfits


def _inner_path(value: Any, location: Pointer) -> Pointer:
    """Return the path within a value, without pydantic's names of union members."""
    path: list[str | int] = []
    for part in location:
        is_index = isinstance(value, list) and isinstance(part, int)
        if is_index or (isinstance(value, dict) and part in value):
            path.append(part)
            value = value[part]
    return tuple(path)


def _problems(given: Given, errors: Errors) -> list[Problem]:
    """Return one problem for each innermost invalid part."""
    paths = dict.fromkeys(path for path, _ in errors)
    innermost = [
        path for path in paths if not any(p != path and p[: len(path)] == path for p in paths)
    ]
    return [
        _problem(given, path, {kind for other, kind in errors if other == path})
        for path in innermost[:20]
    ]


def _problem(given: Given, path: Pointer, kinds: set[str]) -> Problem:
    location = given.location(path)
    name = given.leaf + "".join(
        f"[{part}]" if isinstance(part, int) else f".{shown_key(part)}" for part in path
    )
    if "extra_forbidden" in kinds:
        key = str(path[-1])
        keys = keys_at(given.leaf, path[:-1])
        remedy = did_you_mean(key, keys) or f"known keys: {', '.join(keys)}"
        return Problem(f"{name} is an unknown key", location, remedy=remedy)
    value = given.value
    for part in path:
        value = value[part]
    if "missing" in kinds:
        keys = [key for key in _required_keys(given.leaf, path) if key not in value]
        return Problem(f"{name} lacks {', '.join(keys)}", location, expectation(given.leaf, path))
    is_secret = given.leaf in SECRET_KEYS
    if limit := exceeded_limit(spec_at(given.leaf, path), kinds):
        number = repr(value)
        shown = number if len(number) < 40 else f"{number[:37]}..."
        what, why = f"{name} cannot be {shown}", f"it must be {limit}"
        return Problem(what, location, why, _remedy(given, path, value))
    what = f"{name} cannot be {given_text(value, is_secret=is_secret)}"
    why = expectation(given.leaf, path)
    return Problem(what, location, why, "" if is_secret else _remedy(given, path, value))


def _required_keys(leaf: str, path: Pointer) -> list[str]:
    """Return the required keys that an object within a value lacks."""
    definitions = spec_at(leaf, path)["$defs"].values()
    return [key for definition in definitions for key in definition.get("required", [])]


def _remedy(given: Given, path: Pointer, value: object) -> str:
    if isinstance(value, str):
        remedy = did_you_mean(value, choices_of(spec_at(given.leaf, path)))
        if remedy:
            return remedy
        meant = from_text(given.leaf, value) if not path else value
        if not isinstance(meant, str) and meant is not None:
            return f"write {str(meant).lower()} without quotes"
        words = {"yes": "true", "on": "true", "no": "false", "off": "false"}
        if value.lower() in words:
            return f"write {words[value.lower()]}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        whole = int(value)
        if path or accepts(given.leaf, whole):
            return f"write {whole}"
    if given.leaf in DATASETS:
        return LIST_FORM
    default = spec_at(given.leaf).get("default")
    if path or default is None:
        return ""
    shown = str(default).lower() if isinstance(default, bool) else default
    return f"--{given.leaf} {shown} is the default"
