"""Columns of a dataset and the standard fields that `dataset_columns` maps them to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from ..errors import ConfigError, DataError, TrainerError
from ..host.quoting import shell_word
from .bad_rows import RowValue, shown_name

FormatName = Literal[
    "messages", "sharegpt", "alpaca", "alpaca_text", "alpaca_chat", "completion", "text"
]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)

STANDARD_FIELDS: dict[FormatName, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "alpaca_text": ("instruction", "input", "output"),
    "alpaca_chat": ("instruction", "input", "output"),
    "completion": ("prompt", "completion", "tools"),
    "text": ("text",),
}
_QUESTIONS = (
    *("instruction", "question", "prompt", "query", "input", "user", "human", "problem"),
    *("request", "source", "ask", "q"),
)
_ANSWERS = (
    *("output", "answer", "response", "completion", "assistant", "reply", "solution", "target"),
    *("chosen", "bot", "gpt", "a"),
)
_CONTEXTS = ("context", "passage", "background")
_TEXTS = ("text", "content", "document", "body", "article")
_MOST_NAMED = 12


def standard_fields() -> str:
    """Return the standard fields of each format, as messages list them."""
    listed = (f"{name} ({', '.join(fields)})" for name, fields in STANDARD_FIELDS.items())
    return "; ".join(listed)


def unrecognised(rows: Sequence[RowValue], where: str) -> TrainerError:
    """Return the error of rows of no known format, with a mapping of their own columns."""
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    listed = ", ".join(shown_name(name) for name in names[:_MOST_NAMED]) or "none"
    if {"chosen", "rejected"} <= set(names):
        why = f"preference data (chosen, rejected) is not supported; its fields are {listed}"
        mapping = {"prompt": "prompt", "completion": "chosen"}
    else:
        why = f"its fields are {listed}; the formats and their fields: {standard_fields()}"
        mapping = _suggested(rows, names)
    return DataError.of(
        "the dataset's format is not recognised",
        where=where,
        why=why,
        remedy=f"name its columns with {_flag(mapping)}",
    )


def _flag(mapping: Mapping[str, str]) -> str:
    """Return the flag as a shell takes it."""
    return f"--dataset_columns {shell_word(json.dumps(mapping, ensure_ascii=False))}"


def _suggested(rows: Sequence[RowValue], names: Sequence[str]) -> dict[str, str]:
    """Return the likeliest mapping: by what columns hold, by their names, by their order."""
    # A name may be a line of data where a CSV file has no header.
    usable = [name for name in names if name.isprintable() and 0 < len(name) <= 40]
    values = {name: _first_value(rows, name) for name in usable}
    if turns := next((name for name, value in values.items() if _holds_turns(value)), None):
        return {"messages": turns}
    texts = [name for name, value in values.items() if isinstance(value, str)]
    question, answer = _named_like(_QUESTIONS, texts), _named_like(_ANSWERS, texts)
    if len(texts) == 1 or (not (question or answer) and _named_like(_TEXTS, texts)):
        return {"text": _named_like(_TEXTS, texts) or texts[0]}
    rest = [name for name in texts if name not in (question, answer)]
    question = question or (rest.pop(0) if rest else "<column>")
    answer = answer or (rest.pop(0) if rest else "<column>")
    context = _named_like(_CONTEXTS, rest)
    return {"instruction": question, **({"input": context} if context else {}), "output": answer}


def _first_value(rows: Sequence[RowValue], name: str) -> Any:
    held = (row[name] for row in rows if isinstance(row, dict) and row.get(name) is not None)
    return next(held, None)


def _holds_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _named_like(words: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the name that is one of the words, else one that holds a long one of them."""
    lowered = {name.lower().strip(): name for name in reversed(names)}
    exact = next((lowered[word] for word in words if word in lowered), None)
    within = (own for word in words if len(word) > 3 for low, own in lowered.items() if word in low)
    return exact or next(within, None)


def applicable(rows: Sequence[RowValue], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a mapping whose columns the rows have."""
    present = {name for row in rows if isinstance(row, dict) for name in row}
    return {field: column for field, column in columns.items() if column in present}


def check_columns(rows: Iterable[RowValue], columns: Mapping[str, str], where: str = "") -> None:
    """Refuse a column mapping that cannot be meant.

    Raises:
        ConfigError: an unknown standard field, or a column that none of the rows has.
    """
    known = {name for names in STANDARD_FIELDS.values() for name in names}
    if unknown := sorted(set(columns) - known):
        raise ConfigError.of(
            f"dataset_columns maps unknown fields: {', '.join(map(shown_name, unknown))}",
            where=where,
            why="its keys are standard fields: " + standard_fields(),
            remedy=f"write {_flag({'<standard field>': '<column>'})}",
        )
    present = {name for row in rows if isinstance(row, dict) for name in row}
    if missing := sorted(set(columns.values()) - present):
        raise ConfigError.of(
            f"dataset_columns names {', '.join(map(shown_name, missing))}, which none of the "
            "first rows has",
            where=where,
            remedy=f"name one of {', '.join(sorted(map(shown_name, present))[:12])}",
        )


def renamed(row: RowValue, columns: Mapping[str, str]) -> RowValue:
    """Return the row with mapped columns under their standard names."""
    if isinstance(row, str) or not columns:
        return row
    mapped = {name: row[column] for name, column in columns.items() if column in row}
    used = set(columns.values())
    return {**{name: value for name, value in row.items() if name not in used}, **mapped}
