"""Read JSON and YAML text into plain values, remembering the line of each.

JSON is read by the standard library, so its errors are JSON's. YAML is read in its
1.2 core schema, in which `1e-4` is a number and `yes`, `on` and `1:30` are text;
aliases, tags and merge keys, which configurations do not need, are refused.
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
MAX_BYTES = 256 * 1024  # far above any configuration; bounds the time of a wrong file
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
    """A text's value, the line of each of its parts, and what is wrong with it."""

    name: str
    value: Any = None
    lines: dict[Pointer, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def location(self, pointer: Pointer) -> str:
        """Return `file:line /json/pointer`; the line is that of the nearest part known."""
        known = pointer
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known, 1)
        return f"{self.name}:{line} {json_pointer(pointer)}".rstrip()

    def add(self, pointer: Pointer, line: int) -> None:
        """Note where a part is; a key that is already there is a problem."""
        if pointer in self.lines:
            first = self.lines[pointer]
            self.problems.append(
                Problem(
                    f"{shown_key(str(pointer[-1]))} is there twice",
                    f"{self.name}:{line} {json_pointer(pointer)}",
                    f"it was given on line {first} already",
                    "keep one of the two",
                )
            )
        else:
            self.lines[pointer] = line

    def refuse(self, what: str, line: int, pointer: Pointer = (), remedy: str = "") -> None:
        """Note a problem with a part of the text."""
        where = f"{self.name}:{line} {json_pointer(pointer)}".rstrip()
        self.problems.append(Problem(what, where, remedy=remedy))


class _TextError(Exception):
    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.what = what
        self.line = line


def shown_key(key: str) -> str:
    """Return a key as it may be printed: short, on one line."""
    key = key if key.isprintable() and key else repr(key)
    return key if len(key) <= 60 else key[:57] + "..."


def json_pointer(pointer: Pointer) -> str:
    """Return the RFC 6901 form of a path of keys and indices."""
    steps = (shown_key(str(part)).replace("~", "~0").replace("/", "~1") for part in pointer)
    return "".join(f"/{part}" for part in steps)


def read_json(text: str, name: str) -> Document:
    """Read JSON; whatever is wrong is among the document's problems."""
    document = Document(name)
    try:
        json.loads(text)
        starts = [0, *(match.end() for match in re.finditer("\n", text))]
        document.value, _ = _JsonReader(text, starts, document).read(_blank(text, 0), ())
    except json.JSONDecodeError as error:
        remedy = _json_remedy(text, error)
        document.refuse(
            f"this is no JSON: {error.msg} in column {error.colno}", error.lineno, remedy=remedy
        )
    except _TextError as error:
        document.refuse(error.what, error.line)
    except RecursionError:
        document.refuse(f"nested deeper than {MAX_DEPTH} levels", 1)
    except ValueError:  # an integer of more digits than Python converts
        document.refuse("a number has thousands of digits", 1)
    return document


def _json_remedy(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos : error.pos + 1]
    before = text[: error.pos].rstrip()[-1:]
    if rest in ("#", "/"):
        return "JSON has no comments; write the configuration as YAML, which has them"
    if before == "," and rest in ("}", "]", '"'):
        return "remove the comma after the last entry"
    if "Expecting ',' delimiter" in error.msg:
        return "put a comma behind the entry before, or close the text's quotes"
    return ""


def _blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match
    return match.end()


@dataclass(slots=True)
class _JsonReader:
    """Walks over text that is known to be JSON."""

    text: str
    starts: list[int]
    document: Document

    def read(self, at: int, pointer: Pointer) -> tuple[Any, int]:
        """Return the value at an offset, and the offset behind it."""
        line = bisect_right(self.starts, at)
        if len(pointer) > MAX_DEPTH:
            raise _TextError(f"nested deeper than {MAX_DEPTH} levels", line)
        self.document.lines.setdefault(pointer, line)
        if self.text[at] == "{":
            return self._read_object(at, pointer)
        if self.text[at] == "[":
            return self._read_array(at, pointer)
        value, end = json.JSONDecoder().raw_decode(self.text, at)
        if isinstance(value, float) and not math.isfinite(value):
            self.document.refuse(
                "NaN, Infinity and numbers beyond 1e308 are refused", line, pointer
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
            at = _blank(self.text, _blank(self.text, end) + 1)  # over the colon
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
    """Read YAML; whatever is wrong is among the document's problems."""
    document = Document(name)
    try:
        events = iter(yaml.parse(text, Loader=yaml.BaseLoader))
        first = next(event for event in events if not _is_frame(event))
        document.value = _yaml_value(first, events, (), document)
        rest = [event for event in events if not _is_frame(event)]
        if rest:
            document.refuse("one YAML document a file; a second one starts here", _line(rest[0]))
    except StopIteration:
        document.value = None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = error.problem or error.context or "cannot be read"
        document.refuse(f"this is no YAML: {what} in column {column}", line)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.refuse("this is no YAML: a control character, which YAML forbids", line)
    except _TextError as error:
        document.refuse(error.what, error.line)
    except (RecursionError, ValueError):  # ValueError: an escape beyond Unicode
        document.refuse("this is no YAML", 1)
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
        raise _TextError(f"nested deeper than {MAX_DEPTH} levels", line)
    if isinstance(event, yaml.AliasEvent):
        raise _TextError("YAML aliases (*name) are not read; repeat the value", line)
    if getattr(event, "tag", None) is not None:
        raise _TextError("YAML tags (!name) are not read; put text in quotes", line)
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
            raise _TextError("a key must be a word", _line(event))
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
        document.refuse("NaN, Infinity and numbers beyond 1e308 are refused", line, pointer)
        return None
    return float(text) if is_number else text
