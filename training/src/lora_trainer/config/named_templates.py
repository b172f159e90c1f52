"""Chat templates that ship with the trainer: `chat_template: chatml`.

For models whose tokenizer has none, or one that leaves out tools. Each writes tool calls,
and fits the tokenizers that have its markers as tokens; elsewhere a marker is plain text
that no model stops at.
"""

from __future__ import annotations

from collections.abc import Container
from functools import lru_cache
from pathlib import Path

_FOLDER = Path(__file__).with_name("templates")
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]", "[TOOL_CALLS]"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
NAMES = tuple(MARKERS)


@lru_cache
def text_of(name: str) -> str:
    """Return the Jinja text of a template of NAMES."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def fitting(tokens: Container[str]) -> list[str]:
    """Return the names of the templates whose markers are all among a tokenizer's tokens."""
    return [name for name, markers in MARKERS.items() if all(m in tokens for m in markers)]
