"""The keys as a Markdown table for docs/reference.md and as command-line help."""

from __future__ import annotations

import json
from typing import Any

from .aliases import ALIASES
from .constraints import limits_of, spec_at, words_of
from .sections import sections

BEGIN, END = "<!-- keys:begin -->", "<!-- keys:end -->"


def key_table() -> str:
    """Return all keys by section as Markdown tables."""
    lines: list[str] = []
    for name, kind in sections().items():
        lines.append(f"### `{name}`\n\n{(kind.__doc__ or '').splitlines()[0]}\n")
        lines.append("| Key | Type | Default | Limits | Meaning | Also spelled |")
        lines.append("|---|---|---|---|---|---|")
        lines += [_row(leaf) for leaf in kind.model_fields]
        lines.append("")
    return "\n".join(lines)


def _row(leaf: str) -> str:
    spec = spec_at(leaf)
    aliases = ", ".join(f"`{alias}`" for alias, known in ALIASES.items() if known == leaf)
    cells = (
        f"`{leaf}`", words_of(spec), f"`{_default(leaf)}`", limits_of(spec),
        spec.get("description", ""), aliases,
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(leaf: str) -> str:
    kind = next(kind for kind in sections().values() if leaf in kind.model_fields)
    value: Any = kind.model_fields[leaf].get_default(call_default_factory=True)
    return json.dumps(value)


def help_text() -> str:
    """Return all keys by section as plain text, for `--help`."""
    lines = ["Keys, each as --KEY VALUE, LORA_TRAINER_KEY or in the config file:"]
    for name, kind in sections().items():
        lines.append(f"\n{name}: {(kind.__doc__ or '').splitlines()[0]}")
        for leaf in kind.model_fields:
            spec = spec_at(leaf)
            limits = limits_of(spec)
            takes = f"{words_of(spec)}{f' ({limits})' if limits else ''}; default {_default(leaf)}"
            lines.append(f"  --{leaf}\n      {spec.get('description', '')}\n      {takes}")
    return "\n".join(lines)


def replace_block(text: str) -> str:
    """Return a page's text with an updated table between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text does not contain {BEGIN} ... {END}")
    return f"{before}{begin}\n{key_table()}{end}{after}"
