"""How rows differ from the text that is trained, in words and with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

from .examples import Change

_KEEP = "name a chat_template that keeps it"
REMEDIES = {
    Change.THOUGHTS_DROPPED: "split conversations so that each such answer is the last, "
    f"or set train_on to last, or {_KEEP}",
    Change.WORDS_DROPPED: "look at rows with lora-trainer check --show-sample, "
    "then name a chat_template that writes answers as they are",
    Change.THOUGHTS_ADDED: "add the reasoning to the answers, "
    "or name a chat_template that writes answers as they are",
    Change.SYSTEM_DROPPED: _KEEP,
    Change.QUESTION_CHANGED: f"look at rows with lora-trainer check --show-sample, then {_KEEP}",
    Change.START_SPELLED: "leave it out of the rows",
    Change.END_SPELLED: "leave it out of the rows",
    Change.MARKER_UNKNOWN: "write the rows as messages, for the model's own chat template",
}
"""Of the changes that deserve a warning; the others are facts of a template."""
_BY_TEXT = {change.value: change for change in Change}


def warnings_of(rows_changed: Mapping[str, int], rows: int) -> list[str]:
    """Return the changes that lose or add something that is trained, each with its remedy."""
    return [
        f"{count:,} of {rows:,} rows: {text} ({remedy})"
        for text, count in rows_changed.items()
        if (remedy := REMEDIES.get(_BY_TEXT[text]))
    ]


def facts_of(rows_changed: Mapping[str, int], system_prompt: str = "") -> list[str]:
    """Return the changes that a chat template makes to any conversation.

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
