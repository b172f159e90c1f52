"""The entries of a dataset list, as Axolotl writes them too."""

from __future__ import annotations

from typing import Any

# Axolotl's dataset types; its chat_template covers both formats with roles.
DATASET_TYPES = {
    "alpaca": "alpaca_text",
    "chat_template": "auto",
    "sharegpt": "sharegpt",
    "completion": "text",
}
# Axolotl's key -> the values that ask for what happens anyway: the format is detected.
DETECTED: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "csv", "parquet", "arrow", "text"),
    "field_messages": ("messages", "conversations", "conversation"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn", "all"),
    "chat_template": ("tokenizer_default",),
}
LIST_FORM = """write --dataset '["a.jsonl", {"path": "b.jsonl", "weight": 2}]'"""


def normalise_datasets(value: Any) -> Any:
    """Return a dataset, or a list of them, with what needs no saying left out."""
    if isinstance(value, dict):
        value = [value]
    return [_entry(entry) for entry in value] if isinstance(value, list) else value


def _entry(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    kept = {key: value for key, value in entry.items() if not _is_idle(key, value)}
    if "type" in kept and "format" not in kept:
        kind = kept.pop("type")
        kept["format"] = DATASET_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    return kept


def _is_idle(key: str, value: Any) -> bool:
    if key == "message_property_mappings" and isinstance(value, dict):
        return all(_is_idle(f"message_field_{name}", column) for name, column in value.items())
    is_unknown = key not in ("path", "weight", "format", "split", "revision", "type")
    return (is_unknown and value in (None, "", [], {})) or value in DETECTED.get(key, ())


def unreadable_datasets(value: Any) -> tuple[str, str] | None:
    """Return why a dataset cannot be read as it is written, and the remedy; None if it can."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[{", '["')):
        return "it begins like JSON, but cannot be read as such", LIST_FORM
    for number, entry in enumerate(value if isinstance(value, list) else [], 1):
        for key in DETECTED.keys() | {"message_property_mappings"}:
            if not isinstance(entry, dict) or key not in entry or _is_idle(key, entry[key]):
                continue
            if key == "field_messages":
                remedy = """remove it and set dataset_columns: {"messages": "that column"}"""
            elif key.startswith("message_"):
                remedy = "rename the keys of a turn to role and content, or from and value"
            else:
                remedy = f"remove {key}"
            return f"entry {number} has a {key} that is not supported for one dataset alone", remedy
    return None
