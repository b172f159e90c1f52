"""Parse values given as text in the environment or on the command line."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from .aliases import ALIASES, CONVERTED_ALIASES
from .compatibility import DATASETS, NO_MEANING, normalise
from .sections import leaf_sections, sections
from .text import read_yaml


def from_text(key: str, text: str) -> Any:
    """Parse the text given for a key.

    The text is parsed as YAML (`1e-4`, `false`, `[q_proj, v_proj]`, JSON) if the key accepts the
    result, and used as it is otherwise: a run may be named 2024.
    """
    document = read_yaml(text, "")
    parsed = text if document.problems else document.value
    if isinstance(parsed, str) and not text.lstrip().startswith(('"', "'")):
        parsed = text  # unparsed: YAML would drop what follows a #
    if key in CONVERTED_ALIASES or key in NO_MEANING:
        return parsed
    leaf = ALIASES.get(key, key)
    if leaf in DATASETS and isinstance(parsed, dict | list):
        return parsed
    if leaf not in leaf_sections() or accepts(leaf, parsed):
        return parsed
    return text if accepts(leaf, text) or isinstance(parsed, dict | list) else parsed


def accepts(leaf: str, value: Any) -> bool:
    """Return whether a leaf accepts the value."""
    try:
        sections()[leaf_sections()[leaf]].model_validate({leaf: normalise(leaf, value)})
    except ValidationError:
        return False
    return True
