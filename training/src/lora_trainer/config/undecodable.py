"""Values that are not valid UTF-8, such as the names of files from other systems.

They cannot be written to the plan, the events or the model card, so they are rejected before
anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import Problem
from ..host.quoting import as_utf8, is_utf8, printable, shell_word
from .layers import Given
from .schema import SECRET_KEYS
from .text import Pointer

WHY = "plans, events and model cards are written in UTF-8"


def find_undecodable(given: Mapping[str, Given]) -> dict[str, list[Problem]]:
    """Return the problems of each leaf whose text is not valid UTF-8."""
    problems: dict[str, list[Problem]] = {}
    for leaf, one in given.items():
        for pointer, text in _texts(one.value):
            if not is_utf8(text):
                shown = "" if leaf in SECRET_KEYS else f": {printable(text)}"
                problem = Problem(
                    f"{leaf} is not valid UTF-8{shown}",
                    one.location(pointer),
                    WHY,
                    "" if leaf in SECRET_KEYS else _remedy(text, one.folder),
                )
                problems.setdefault(leaf, []).append(problem)
    return problems


def find_undecodable_paths(located: Mapping[str, Any]) -> list[Problem]:
    """Return one problem for each folder whose name makes paths in it not valid UTF-8."""
    folders: dict[Path, str] = {}
    for leaf, value in located.items():
        for _, text in _texts(value):
            if not is_utf8(text):
                folders.setdefault(_undecodable_part(Path(text)), leaf)
    return [
        Problem(
            f"{leaf} is in a folder whose name is not valid UTF-8",
            printable(str(folder)),
            WHY,
            _remedy(str(folder), Path()),
        )
        for folder, leaf in folders.items()
    ]


def _undecodable_part(path: Path) -> Path:
    """Return the outermost folder, or the file itself, whose name is not valid UTF-8."""
    return next(part for part in (*reversed(path.parents), path) if not is_utf8(str(part)))


def _remedy(text: str, folder: Path) -> str:
    path = folder / text
    if not path.exists():
        return "rename it in UTF-8"
    part = _undecodable_part(path)
    return f"mv -- {shell_word(part)} {shell_word(part.with_name(as_utf8(part.name)))}"


def _texts(value: object, pointer: Pointer = ()) -> Iterator[tuple[Pointer, str]]:
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(str(key), pointer)
            yield from _texts(inner, (*pointer, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*pointer, index))
