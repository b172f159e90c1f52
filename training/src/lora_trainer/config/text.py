"""Parse JSON and YAML into plain values with the line number of each.

JSON is parsed by the standard library. YAML uses its 1.2 core schema, in which `1e-4` is a number
and `yes`, `on` and `1:30` are text; aliases, tags and merge keys are rejected, because
configurations do not need them.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import Problem

Pointer = tuple[str | int, ...]
MAX_DEPTH = 20
MAX_BYTES = 256 * 1024  # far above any configuration; bounds the time spent on a wrong file
NULLS = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEANS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
INTEGER = re.compile(r"[-+]?[0-9]{1,4000}")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(slots=True)
class Document:
    """A parsed value, the line of each part, and its problems."""

    name: str
    value: Any = None
    lines: dict[Pointer, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def location(self, pointer: Pointer) -> str:
        """Return `file:line /json/pointer`; the line of the nearest known part."""
        known = pointer
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known, 1)
        return f"{self.name}:{line} {json_pointer(pointer)}".rstrip()

    def add(self, pointer: Pointer, line: int) -> None:
        """Record the line of a part; a duplicate key is a problem."""
        if pointer in self.lines:
            first = self.lines[pointer]
            self.problems.append(
                Problem(
                    f"{shown_key(str(pointer[-1]))} is a duplicate key",
                    f"{self.name}:{line} {json_pointer(pointer)}",
                    f"it is already set on line {first}",
                    "keep one of the two",
                )
            )
        else:
            self.lines[pointer] = line

    def refuse(self, what: str, line: int, pointer: Pointer = (), remedy: str = "") -> None:
        """Record a problem with a part of the text."""
        where = f"{self.name}:{line} {json_pointer(pointer)}".rstrip()
        self.problems.append(Problem(what, where, remedy=remedy))


class _TextError(Exception):
    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.what = what
        self.line = line


def shown_key(key: str) -> str:
    """Return a key for printing: short, on one line."""
    key = key if key.isprintable() and key else repr(key)
    return key if len(key) <= 60 else key[:57] + "..."


def json_pointer(pointer: Pointer) -> str:
    """Return a path of keys and indices as an RFC 6901 JSON pointer."""
    steps = (shown_key(str(part)).replace("~", "~0").replace("/", "~1") for part in pointer)
    return "".join(f"/{part}" for part in steps)


def read_json(text: str, name: str) -> Document:
    """Parse JSON; errors are the document's problems."""
    document = Document(name)
    try:
        json.loads(text)
        starts = [0, *(match.end() for match in re.finditer("\n", text))]
        document.value, _ = _JsonReader(text, starts, document).read(_blank(text, 0), ())
    except json.JSONDecodeError as error:
        remedy = _json_remedy(text, error)
        document.refuse(
            f"invalid JSON: {error.msg} in column {error.colno}", error.lineno, remedy=remedy
        )
    except _TextError as error:
        document.refuse(error.what, error.line)
    except RecursionError:
        document.refuse(f"nested more than {MAX_DEPTH} levels deep", 1)
    except ValueError:  # an integer of more digits than Python converts
        document.refuse("a number has thousands of digits", 1)
    return document


def _json_remedy(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos : error.pos + 1]
    before = text[: error.pos].rstrip()[-1:]
    if rest in ("#", "/"):
        return "JSON does not allow comments; use YAML for a configuration with comments"
    if before == "," and rest in ("}", "]", '"'):
        return "remove the comma after the last entry"
    if "Expecting ',' delimiter" in error.msg:
        return "add a comma after the previous entry, or close the quotes"
    return ""


def _blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match
    return match.end()


@dataclass(slots=True)
class _JsonReader:
    """Walks through valid JSON text to find the line of each value."""

    text: str
    starts: list[int]
    document: Document

    def read(self, at: int, pointer: Pointer) -> tuple[Any, int]:
        """Return the value at an offset, and the offset after it."""
        line = bisect_right(self.starts, at)
        if len(pointer) > MAX_DEPTH:
            raise _TextError(f"nested more than {MAX_DEPTH} levels deep", line)
        self.document.lines.setdefault(pointer, line)
        if self.text[at] == "{":
            return self._read_object(at, pointer)
        if self.text[at] == "[":
            return self._read_array(at, pointer)
        value, end = json.JSONDecoder().raw_decode(self.text, at)
        if isinstance(value, float) and not math.isfinite(value):
            self.document.refuse(
                "NaN, Infinity and numbers beyond 1e308 are not allowed", line, pointer
            )
            value = None
        return value, end

    def _read_object(self, at: int, pointer: Pointer) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = _blank(self.text, at + 1)
        while self.text[at] != "}":
            key, end = json.JSONDecoder().raw_decode(self.text, at)
            inner = (*pointer, key)
            self.document.add(inner, bisect_right(self.starts, at))
            at = _blank(self.text, _blank(self.text, end) + 1)  # skip the colon
            value, at = self.read(at, inner)
            values.setdefault(key, value)
            at = self._over_comma(at)
        return values, at + 1

    def _read_array(self, at: int, pointer: Pointer) -> tuple[list[Any], int]:
        values: list[Any] = []
        at = _blank(self.text, at + 1)
        while self.text[at] != "]":
            value, at = self.read(at, (*pointer, len(values)))
            values.append(value)
            at = self._over_comma(at)
        return values, at + 1

    def _over_comma(self, at: int) -> int:
        at = _blank(self.text, at)
        return _blank(self.text, at + 1) if self.text[at] == "," else at


def read_yaml(text: str, name: str) -> Document:
    """Parse YAML; errors are the document's problems."""
    document = Document(name)
    try:
        events = iter(yaml.parse(text, Loader=yaml.BaseLoader))
        first = next(event for event in events if not _is_frame(event))
        document.value = _yaml_value(first, events, (), document)
        rest = [event for event in events if not _is_frame(event)]
        if rest:
            document.refuse(
                "only one YAML document per file; a second one starts here", _line(rest[0])
            )
    except StopIteration:
        document.value = None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = error.problem or error.context or "cannot be read"
        document.refuse(f"invalid YAML: {what} in column {column}", line)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.refuse("invalid YAML: control characters are not allowed in YAML", line)
    except _TextError as error:
        document.refuse(error.what, error.line)
    except (RecursionError, ValueError):  # ValueError: an escape beyond Unicode
        document.refuse("invalid YAML", 1)
    return document


def _is_frame(event: yaml.Event) -> bool:
    frames = (yaml.StreamStartEvent, yaml.StreamEndEvent)
    return isinstance(event, (*frames, yaml.DocumentStartEvent, yaml.DocumentEndEvent))


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _yaml_value(
    event: yaml.Event, events: Iterator[yaml.Event], pointer: Pointer, document: Document
) -> Any:
    line = _line(event)
    if len(pointer) > MAX_DEPTH:
        raise _TextError(f"nested more than {MAX_DEPTH} levels deep", line)
    if isinstance(event, yaml.AliasEvent):
        raise _TextError("YAML aliases (*name) are not supported; repeat the value", line)
    if getattr(event, "tag", None) is not None:
        raise _TextError("YAML tags (!name) are not supported; quote the text", line)
    document.lines.setdefault(pointer, line)
    if isinstance(event, yaml.ScalarEvent):
        return _yaml_scalar(event, line, pointer, document)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_yaml_value(event, events, (*pointer, len(items)), document))
        return items
    values: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise _TextError("a key must be a plain word", _line(event))
        inner = (*pointer, event.value)
        document.add(inner, _line(event))
        values.setdefault(event.value, _yaml_value(next(events), events, inner, document))
    return values


def _yaml_scalar(event: yaml.ScalarEvent, line: int, pointer: Pointer, document: Document) -> Any:
    text: str = event.value
    if not event.implicit[0]:
        return text
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    is_number = NUMBER.fullmatch(text) is not None
    if NOT_FINITE.fullmatch(text) or (is_number and math.isinf(float(text))):
        document.refuse("NaN, Infinity and numbers beyond 1e308 are not allowed", line, pointer)
        return None
    return float(text) if is_number else text
