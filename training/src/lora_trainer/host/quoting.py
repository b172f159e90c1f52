"""Make names safe to print: escape control characters, quote shell words."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_BUT_NEWLINE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """Return text with control characters and lone surrogates escaped."""
    pattern = _CONTROL_BUT_NEWLINE if keep_newlines else _CONTROL
    return pattern.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a non-UTF-8 byte of a file name
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shell_word(path: str | Path) -> str:
    """Return a path as one shell word, with ASCII escapes if needed."""
    text = str(path)
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def is_utf8(text: str) -> bool:
    """Return whether text can be encoded as UTF-8; file names in other encodings cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_utf8(path: str) -> str:
    """Return the most likely name of a path in Western European encodings."""
    try:
        return os.fsencode(path).decode("cp1252", "replace")
    except UnicodeEncodeError:
        return path.encode("utf-8", "replace").decode()
