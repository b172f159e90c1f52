"""Values written as text, in the environment and on the command line."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from .aliases import ALIASES, CONVERTED_ALIASES
from .compatibility import DATASETS, NO_MEANING, normalise
from .schema import leaf_sections, sections
from .text import read_yaml


def from_text(key: str, text: str) -> Any:
    """Return the value that a text stands for under a key.

    The text is read as YAML (so `1e-4`, `false`, `[q_proj, v_proj]` and JSON mean what
    they say) where the key takes such a value, and as itself otherwise: a run may be
    named 2024.
    """
    document = read_yaml(text, "")
    parsed = text if document.problems else document.value
    if isinstance(parsed, str) and not text.lstrip().startswith(('"', "'")):
        parsed = text  # as it stands, with a # that YAML takes for a comment
    if key in CONVERTED_ALIASES or key in NO_MEANING:
        return parsed
    leaf = ALIASES.get(key, key)
    if leaf in DATASETS and isinstance(parsed, dict | list):
        return parsed
    if leaf not in leaf_sections() or accepts(leaf, parsed):
        return parsed
    return text if accepts(leaf, text) or isinstance(parsed, dict | list) else parsed


def accepts(leaf: str, value: Any) -> bool:
    """Return whether a leaf takes the value."""
    try:
        sections()[leaf_sections()[leaf]].model_validate({leaf: normalise(leaf, value)})
    except ValidationError:
        return False
    return True
