"""Read rows of JSON files: one object per line, an array, or concatenated objects."""

from __future__ import annotations

import ast
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import DataError, TrainerError
from ..host.quoting import shell_word
from .bad_rows import MAX_LISTED, BadRow, Row, shown_name
from .lines import BYTE_ORDER_MARK, decoded_lines, iter_lines, refuse_other_encoding
from .resolve import DataFile


class DuplicateKeyError(ValueError):
    """An object contains a key twice, so its value is ambiguous."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise DuplicateKeyError(f"an object contains the key {shown_name(twice)} twice: keep one")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_ARRAY_LINES = "is a JSON list, expected an object"


def rows_of_json(stream: BinaryIO, file: DataFile, split: str) -> Iterator[Row | BadRow]:
    """Yield the rows of a JSON file, according to its content, whatever its name.

    Raises:
        DataError: the file is not JSON, or JSON without rows.
    """
    if _holds_lines(stream, file):
        yield from _line_rows(stream, file)
    else:
        yield from _document_rows(stream, file, split)


def _holds_lines(stream: BinaryIO, file: DataFile) -> bool:
    """Return whether a file has one value per line and is not one multi-line document."""
    start = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    stream.seek(0)
    filled = (line for _, line in iter_lines(stream) if line is None or line.strip())
    first, second = next(filled, None), next(filled, b"")
    stream.seek(0)
    if start.startswith(b"["):
        # One array per line; a single array on one line, or over many, is a document.
        return bool(second) and first is not None and _is_json(first)
    if first is not None and first.strip() == b"{":
        return False
    if file.kind == "jsonl":
        return True
    if first is None or second == b"":
        return False
    first = first.strip()
    return first.startswith(b"{") and first.endswith(b"}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _line_rows(stream: BinaryIO, file: DataFile) -> Iterator[Row | BadRow]:
    """Yield one row per line; a file whose first lines are all of another kind is one error."""
    lines = decoded_lines(stream, file)
    held: list[BadRow] = []
    first_text = ""
    for line in lines:
        row, is_foreign = (line, True) if isinstance(line, BadRow) else _line_row(*line)
        if not is_foreign:
            yield from held
            yield row
            break
        assert isinstance(row, BadRow)
        held.append(row)
        first_text = first_text or ("" if isinstance(line, BadRow) else line[1])
        if len(held) == MAX_LISTED:
            raise _no_json_lines(held, first_text, file)
    else:
        if len(held) > 1:
            raise _no_json_lines(held, first_text, file)
        yield from held
    for line in lines:
        yield line if isinstance(line, BadRow) else _line_row(*line)[0]


def _no_json_lines(held: list[BadRow], first_text: str, file: DataFile) -> TrainerError:
    """Return the error for a file in which no line is a JSON object."""
    why, remedy = _explained(held, first_text, file)
    return DataError.of("the file is not JSON lines", held[0].where, why, remedy)


def _explained(held: list[BadRow], first_text: str, file: DataFile) -> tuple[str, str]:
    source, base = shell_word(file.path), file.path.name.split(".")[0]
    target = shell_word(file.path.with_name(f"{base}.converted.jsonl"))
    if all(bad.reason == _ARRAY_LINES for bad in held):
        return (
            "every line is a JSON array, expected an object",
            f"jq -c '{{messages: .}}' {source} > {target}",
        )
    if _is_python(first_text):
        program = "import ast,json,sys\nfor l in sys.stdin: print(json.dumps(ast.literal_eval(l)))"
        escaped = program.replace("\n", "\\n")
        return (
            "its lines are Python dictionaries, whose quotes are not valid JSON",
            f"python3 -c $'{escaped}' < {source} > {target}",
        )
    count = f"none of the first {len(held)} lines is a JSON object; the first one: {held[0].reason}"
    if "," in first_text and not first_text.lstrip().startswith(("{", '"')):
        renamed = shell_word(file.path.with_suffix(".csv"))
        return f"{count}; its first line looks like CSV", f"mv {source} {renamed}"
    return count, "write one JSON object per line, or rename the file to match its content"


def _is_python(text: str) -> bool:
    """Return whether a line is a dictionary as Python prints it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return isinstance(ast.literal_eval(text.strip()[:100_000]), dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _line_row(where: str, text: str) -> tuple[Row | BadRow, bool]:
    """Return a line's row, and whether the line is not JSON or not an object."""
    try:
        # Without its line break: a truncated row would be reported on the next line.
        value = _DECODER.decode(text.rstrip("\r\n"))
    except DuplicateKeyError as error:
        return BadRow(where, str(error)), False
    except json.JSONDecodeError as error:
        nul = ", it contains a NUL character" if "\0" in text else ""
        return BadRow(where, f"invalid JSON at column {error.colno}{nul}"), True
    except (ValueError, RecursionError):
        return BadRow(where, "JSON with too long a number or too deep nesting"), False
    row = _row(value, where)
    return row, isinstance(row, BadRow)


def _row(value: object, where: str) -> Row | BadRow:
    if isinstance(value, dict | str):
        return Row(value, where)
    return BadRow(where, f"is a JSON {type(value).__name__}, expected an object")


def _document_rows(stream: BinaryIO, file: DataFile, split: str) -> Iterator[Row | BadRow]:
    """Yield the rows of an array, of {"data": [...]}, or of concatenated objects."""
    content = stream.read().removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        return
    rows = _rows_in(_documents(content, file), file, split)
    del content
    for index, value in enumerate(rows, start=1):
        yield _row(value, f"{file.shown}: row {index}")


def _rows_in(documents: list[Any], file: DataFile, split: str) -> list[Any]:
    if len(documents) != 1:  # none if everything is Unicode white space
        return documents
    (document,) = documents
    if isinstance(document, dict):
        lists = (document[key] for key in ("data", split) if isinstance(document.get(key), list))
        document = next(lists, [document])
    if not isinstance(document, list):
        kind = type(document).__name__
        raise DataError.of(f"the file is a JSON {kind}, expected an array of rows", file.shown)
    return document


def _documents(content: bytes, file: DataFile) -> list[Any]:
    """Return the JSON values of a file, usually one."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        refuse_other_encoding(content, file, line)
        raise DataError.of("the file is not valid UTF-8", where=f"{file.shown}:{line}") from error
    values: list[Any] = []
    start = len(text) - len(text.lstrip())
    try:
        while start < len(text):
            # Only objects may be concatenated; anything after another value is an error.
            if values and not (isinstance(values[-1], dict) and text[start] == "{"):
                raise json.JSONDecodeError("Extra data", text, start)
            value, start = _DECODER.raw_decode(text, start)
            values.append(value)
            while start < len(text) and text[start].isspace():
                start += 1
    except json.JSONDecodeError as error:
        raise DataError.of(
            f"invalid JSON at column {error.colno}",
            where=f"{file.shown}:{error.lineno}",
            remedy=f"python3 -m json.tool {shell_word(file.path)}",
        ) from error
    except DuplicateKeyError as error:
        raise DataError.of(str(error), where=file.shown) from error
    except (ValueError, RecursionError) as error:
        raise DataError.of(
            "JSON with too long a number or too deep nesting", where=file.shown
        ) from error
    return values
