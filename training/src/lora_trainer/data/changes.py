"""Report how the training text differs from the rows, with remedies."""

from __future__ import annotations

from collections.abc import Mapping

from .examples import Change

_KEEP = "set a chat_template that keeps it"
REMEDIES = {
    Change.THOUGHTS_DROPPED: "split conversations so that each such answer is the last, "
    f"or set train_on to last, or {_KEEP}",
    Change.WORDS_DROPPED: "look at rows with lora-trainer check --show-sample, "
    "then set a chat_template that leaves answers unchanged",
    Change.THOUGHTS_ADDED: "add the reasoning to the answers, "
    "or set a chat_template that leaves answers unchanged",
    Change.SYSTEM_DROPPED: _KEEP,
    Change.QUESTION_CHANGED: f"look at rows with lora-trainer check --show-sample, then {_KEEP}",
    Change.START_SPELLED: "remove it from the rows",
    Change.END_SPELLED: "remove it from the rows",
    Change.MARKER_UNKNOWN: "write the rows as messages for the model's own chat template",
}
"""Remedies of the changes that deserve a warning; others are properties of the template."""
_BY_TEXT = {change.value: change for change in Change}


def warnings_of(rows_changed: Mapping[str, int], rows: int) -> list[str]:
    """Return the changes that lose or add supervised text, each with its remedy."""
    return [
        f"{count:,} of {rows:,} rows: {text} ({remedy})"
        for text, count in rows_changed.items()
        if (remedy := REMEDIES.get(_BY_TEXT[text]))
    ]


def facts_of(rows_changed: Mapping[str, int], system_prompt: str = "") -> list[str]:
    """Return the changes that the chat template makes to every conversation.

    `system_prompt` is the one that the template adds.
    """
    facts = []
    for text, count in rows_changed.items():
        if (change := _BY_TEXT[text]) in REMEDIES:
            continue
        fact = f"{text}, in {count:,} rows"
        if change is Change.SYSTEM_ADDED and system_prompt:
            fact += f": {system_prompt!r}; a system message in a row replaces it"
        facts.append(fact)
    return facts
