"""The values of one source under canonical names, each with its origin.

A `Layer` collects the values of one source (the file, the environment, the command line),
translates other trainers' spellings, and reports unknown keys, keys in the wrong section and
duplicates.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import Problem
from .aliases import ALIASES, CONVERTED_ALIASES
from .compatibility import NO_MEANING, Ignored, Means, Refused, interpret
from .literal import accepts
from .schema import SECRET_KEYS
from .sections import leaf_sections, section_names
from .text import Document, Pointer, shown_key

OriginKind = Literal["default", "file", "environment", "command line", "argument", "adapter"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from; `location` is empty for a default."""

    kind: OriginKind = "default"
    location: str = ""

    def __str__(self) -> str:
        if self.kind in ("default", "file"):
            return self.location or self.kind
        return f"{self.kind} {self.location}"


@dataclass(frozen=True, slots=True)
class Given:
    """One value from a source; its relative paths start at `folder`."""

    leaf: str
    value: Any
    origin: Origin
    folder: Path
    document: Document | None = None
    pointer: Pointer = ()

    def location(self, inner: Pointer = ()) -> str:
        """Return the location of the value or of a part of it."""
        if self.document:
            return self.document.location((*self.pointer, *inner))
        return self.origin.location


@dataclass(slots=True)
class Layer:
    """The values of one source, and their problems."""

    kind: OriginKind
    folder: Path
    given: dict[str, Given] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(
        self,
        key: str,
        value: object,
        location: str,
        *,
        section: str = "",
        document: Document | None = None,
        pointer: Pointer = (),
    ) -> None:
        """Add a value under the key that the user wrote in `section`.

        Null in a file, like an empty YAML entry, means that the key is not set.
        """
        meaning = interpret(key, value)
        if meaning is None and key not in section_names() and value in (None, "", []):
            return  # left blank in the templates of other trainers
        if meaning is None:
            self.problems.append(unknown_key(key, location, section, value))
        elif isinstance(meaning, Ignored):
            if meaning.reason:
                self.warnings.append(f"{location}: {key} has no effect: {meaning.reason}")
        elif isinstance(meaning, Refused):
            what = f"{key} cannot be {given_text(value, is_secret=meaning.leaf in SECRET_KEYS)}"
            self.problems.append(Problem(what, location, meaning.why, meaning.remedy))
        elif section and leaf_sections()[meaning.leaf] != section:
            home = leaf_sections()[meaning.leaf]
            self.problems.append(
                Problem(
                    f"{key} does not belong in {section}",
                    location,
                    f"it belongs to {home}",
                    f"move it to {home}, or to the top level",
                )
            )
        elif (meaning.value is None and self.kind == "file") or self._is_said(
            key, meaning, pointer
        ):
            return
        elif meaning.leaf in self.given:
            name = key if key == meaning.leaf else f"{key} ({meaning.leaf})"
            other = self.given[meaning.leaf].origin.location
            self.problems.append(
                Problem(
                    f"{name} is given twice",
                    location,
                    f"{other} sets the same key",
                    "keep one of the two",
                )
            )
        else:
            origin = Origin(self.kind, location)
            self.given[meaning.leaf] = Given(
                meaning.leaf, meaning.value, origin, self.folder, document, pointer
            )

    def _is_said(self, key: str, meaning: Means, pointer: Pointer) -> bool:
        """Return whether the value is implied by one already set under another spelling.

        Axolotl's lora_target_linear adds all linear layers to the named modules.
        """
        other = self.given.get(meaning.leaf)
        if other is None or other.pointer == pointer == ():
            return False
        if other.value == meaning.value or _gives_way(key, meaning.value, other.value):
            return True
        if other.pointer and _gives_way(str(other.pointer[-1]), other.value, meaning.value):
            del self.given[meaning.leaf]
            return False
        if "lora_target_linear" not in (key, *other.pointer[-1:]):
            return False
        self.given[meaning.leaf] = replace(other, value="all-linear")
        return True


# Switches of the loss mask -> what `false` means alone, and what it rules out.
SWITCHED_OFF = {
    "train_on_inputs": ("assistant", "all"),
    "train_on_prompt": ("assistant", "all"),
    "assistant_only_loss": ("completion", "assistant"),
    "completion_only_loss": ("all", "completion"),
}


def _gives_way(key: str, value: Any, other: Any) -> bool:
    """Return whether a switch that is off leaves the choice to another key."""
    alone, ruled_out = SWITCHED_OFF.get(key, (None, None))
    return alone is not None and value == alone and other != ruled_out


def unknown_key(key: str, location: str, section: str = "", value: Any = None) -> Problem:
    """Return the problem of an unknown key."""
    if key in section_names():
        why = f"{key} is a section of its own"
        return Problem(
            f"{key} is not a key of {section}", location, why, "move it to the top level"
        )
    remedy = guess_key(key, value, section_names())
    if key.startswith(("_", "//", "#")) and not remedy:
        remedy = "to write comments, use YAML"
    return Problem(f"{shown_key(key)} is an unknown key", location, remedy=remedy)


def guess_key(
    key: str, value: Any, others: Iterable[str] = (), form: Callable[[str], str] = str
) -> str:
    """Return a question naming the closest keys that take such a value, or nothing.

    A secret's name, and a key without an effect, must be close: `tokenizer` is no `token`.
    """
    ours = [*leaf_sections(), *ALIASES]
    fitting = [name for name in ours if ALIASES.get(name, name) not in SECRET_KEYS]
    if value is not None:
        fitting = [
            n for n in fitting if n in CONVERTED_ALIASES or accepts(ALIASES.get(n, n), value)
        ]
    hidden = [name for name in ours if ALIASES.get(name, name) in SECRET_KEYS]
    close = difflib.get_close_matches(key.lower(), [*hidden, *NO_MEANING], n=2, cutoff=0.85)
    return did_you_mean(key, [*fitting, *close, *others], form)


def did_you_mean(word: str, choices: Iterable[str], form: Callable[[str], str] = str) -> str:
    """Return "did you mean" with the closest keys, or an empty string."""
    word = word[:100].lower().replace("-", "_")
    close = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.7)
    named = dict.fromkeys(form(ALIASES.get(match, match)) for match in close)
    return f"did you mean {' or '.join(named)}?" if named else ""


def given_text(value: Any, *, is_secret: bool = False) -> str:
    """Return a value and its type as text; for a secret only the type."""
    shown, kind = repr(value), "a number"
    if value is None:
        return "null"
    if isinstance(value, bool):
        shown, kind = str(value).lower(), "a truth value"
    elif isinstance(value, int):
        shown, kind = (shown if len(shown) < 40 else shown[:37] + "..."), "a whole number"
    elif isinstance(value, str):
        shown, kind = (repr(value[:57] + "...") if len(value) > 60 else shown), "text"
    elif isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    elif isinstance(value, dict):
        return f"an object of {len(value)}"
    return kind if is_secret else f"{shown} ({kind})"
