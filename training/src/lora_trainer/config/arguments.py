"""Values from the command line: `--key value`, `--key=value`, `--no-key`, `--set section.key=v`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import Problem
from .aliases import ALIASES, COMMA_LISTS, CONVERTED_ALIASES
from .compatibility import NO_MEANING
from .layers import Layer, did_you_mean, guess_key
from .literal import accepts, from_text
from .sections import leaf_sections, section_names, sections
from .text import shown_key

BARE = {"resume": "auto"}  # what a flag without a value means


@dataclass(frozen=True, slots=True)
class _Flag:
    """One flag; `text` is None if no value follows it."""

    key: str
    section: str
    text: str | None
    location: str
    is_negated: bool = False


def read_arguments(arguments: Sequence[str]) -> Layer:
    """Return the values of the command line; a repeated flag is a problem."""
    layer = Layer("command line", Path())
    rest = list(arguments)
    previous = "the start"
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and word != "--":
            flag = _with_more_words(_split(word, rest), rest)
            _take(layer, flag)
            previous = flag.location
        else:  # not shown: it may be a misplaced secret
            what = f"argument {len(arguments) - len(rest)} does not follow a flag"
            layer.problems.append(Problem(what, f"after {previous}", remedy="write --key value"))
    return layer


def read_values(values: Mapping[str, Any]) -> Layer:
    """Return the values that Python code gives."""
    layer = Layer("argument", Path())
    for key, value in values.items():
        layer.add(key, _plain(value), key)
    return layer


def _plain(value: Any) -> Any:
    """Return a value as a file would hold it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _split(word: str, rest: list[str]) -> _Flag:
    """Return the flag that a word starts, and remove its value from the rest if it takes one."""
    name, equals, text = word[2:].partition("=")
    value: str | None = text if equals else None
    location = f"--{shown_key(name)}"
    if name == "set":
        pair = value if value is not None else _pop_value(rest)
        name, equals, text = (pair or "").partition("=")
        location = f"--set {shown_key(name)}" if name else "--set"
        value = text if equals else None
    section, dot, key = name.rpartition(".")
    key = key.replace("-", "_")
    if key.startswith("no_") and not _is_known(key) and not location.startswith("--set"):
        return _Flag(key[3:], section if dot else "", value, location, is_negated=True)
    if value is None and not location.startswith("--set"):
        is_switch = _is_foreign(key) or (_is_known(key) and accepts(ALIASES.get(key, key), True))
        if not (is_switch and rest and rest[0].startswith("--")):
            value = _pop_value(rest)
        if value is None and is_switch:
            value = "true"
        value = BARE.get(key) if value is None else value
    return _Flag(key, section if dot else "", value, location)


def _with_more_words(flag: _Flag, rest: list[str]) -> _Flag:
    """Return a flag that takes a list with the words behind its first, as `--report_to a b`."""
    if flag.text is None or ALIASES.get(flag.key, flag.key) not in COMMA_LISTS:
        return flag
    words = [flag.text]
    while rest and not rest[0].startswith("--"):
        words.append(rest.pop(0))
    return replace(flag, text=",".join(words)) if len(words) > 1 else flag


def _pop_value(rest: list[str]) -> str | None:
    return rest.pop(0) if rest and not rest[0].startswith("--") else None


def _is_known(key: str) -> bool:
    return ALIASES.get(key, key) in leaf_sections() or key in NO_MEANING


def _is_foreign(key: str) -> bool:
    return key in CONVERTED_ALIASES or key in NO_MEANING


def _take(layer: Layer, flag: _Flag) -> None:
    if flag.key in section_names() and not _is_known(flag.key):
        what = f"{flag.key} is a section"
        keys = ", ".join(list(sections()[flag.key].model_fields)[:3])
        layer.problems.append(
            Problem(what, flag.location, remedy=f"use one of its keys: {keys}, ...")
        )
    elif not _is_known(flag.key):
        layer.problems.append(_unknown(flag))
    elif flag.section and flag.section not in section_names():
        remedy = did_you_mean(flag.section, section_names())
        what = f"{shown_key(flag.section)} is an unknown section"
        layer.problems.append(Problem(what, flag.location, remedy=remedy))
    elif flag.is_negated:
        _take_negated(layer, flag)
    elif flag.text is None:
        remedy = f"write --{flag.key} VALUE, or --set {flag.key}=VALUE"
        layer.problems.append(Problem(f"{flag.key} needs a value", flag.location, remedy=remedy))
    else:
        value: Any = from_text(flag.key, flag.text)
        layer.add(flag.key, value, flag.location, section=flag.section)


def _take_negated(layer: Layer, flag: _Flag) -> None:
    if flag.text is not None:
        remedy = f"write --{flag.key} true or false"
        layer.problems.append(Problem("--no- flags take no value", flag.location, remedy=remedy))
    elif not (_is_foreign(flag.key) or accepts(ALIASES.get(flag.key, flag.key), False)):
        remedy = f"write --{flag.key} VALUE"
        what = f"{flag.key} is not a true/false option"
        layer.problems.append(Problem(what, flag.location, remedy=remedy))
    else:
        layer.add(flag.key, False, flag.location, section=flag.section)


def _unknown(flag: _Flag) -> Problem:
    value = None if flag.text is None else from_text(flag.key, flag.text)
    remedy = guess_key(flag.key, value, form=lambda leaf: f"--{leaf}")
    return Problem(f"{flag.location} is an unknown flag", flag.location, remedy=remedy)
