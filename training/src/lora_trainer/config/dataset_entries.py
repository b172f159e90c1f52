"""Entries of a dataset list, in Axolotl's form too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from .types import DatasetFormat

# Axolotl's dataset types; its chat_template covers both formats with roles.
DATASET_TYPES = {
    "alpaca": "alpaca_text",
    "chat_template": "auto",
    "sharegpt": "sharegpt",
    "completion": "text",
}
RENAME = "rename the keys of a turn to role and content, or from and value"
# Axolotl's key -> the values that change nothing, because the format is detected.
DETECTED: dict[str, tuple[Any, ...]] = {
    "ds_type": ("json", "csv", "parquet", "arrow", "text"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "train_on_eos": ("turn", "all"),
    "chat_template": ("tokenizer_default",),
    "trust_remote_code": (False,),
    "drop_system_message": (False,),
    "message_field_training": ("train", "training", "trainable", "weight"),
    "message_field_training_detail": (),
    "split_thinking": (False,),
    "shards": (1,),
    "conversation": (),
    "field_human": ("human",),
    "field_model": ("gpt",),
}
# Keys of such an entry that are refused -> what to write; without one, the remedy is to remove it.
REMEDIES = {
    "roles": "rename the roles in the rows to system, user, assistant and tool",
    "message_property_mappings": RENAME,
    "message_field_role": RENAME,
    "message_field_content": RENAME,
    "message_field_training": "rename that key of a turn to train",
    "message_field_training_detail": "split such turns, and mark each with train: true or false",
    "split_thinking": "remove split_thinking: turns are written as the template renders them",
    "chat_template": "write one chat_template at the top level",
    "conversation": "remove conversation and write chat_template at the top level",
    "shards": "write max_samples",
}
# Axolotl's keys that name a column -> the standard field it holds; None: read anyway.
COLUMNS: dict[str, str | None] = {
    "field": "text", "field_instruction": "instruction", "field_input": "input",
    "field_output": "output", "field_system": "system", "field_tools": "tools",
    "field_messages": "messages",
}  # fmt: skip
STANDARD_CONVERSATIONS = ("messages", "conversations", "conversation")
# The roles that Axolotl's `roles` may group under one name, as they are read here too.
ROLES = {
    "user": {"user", "human"}, "assistant": {"assistant", "gpt", "model"}, "system": {"system"},
    "tool": {"tool"},
}  # fmt: skip
READERS = ("json", "csv", "parquet", "arrow", "text")
OWN_KEYS = (
    "path", "weight", "format", "split", "revision", "type", "columns", "subset", "max_samples",
)  # fmt: skip
OWN_PROMPT = (
    "write the rows as messages, prompt and completion or text, and remove type: the format is "
    "detected"
)
PART_OF_SPLIT = "part of a split, which is not supported"
WHOLE_SPLIT = "name the split alone; max_samples takes its first rows, eval_fraction holds rows out"
LIST_FORM = """write --dataset '["a.jsonl", {"path": "b.jsonl", "weight": 2}]'"""


def normalise_datasets(value: Any) -> Any:
    """Return a dataset, or a list of them, without redundant keys."""
    if isinstance(value, dict):
        value = [value]
    return [_entry(entry) for entry in value] if isinstance(value, list) else value


def with_one_template(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a file's keys with the template that all its datasets share at the top level."""
    lists = {
        key: keys[key] for key in ("datasets", "test_datasets") if isinstance(keys.get(key), list)
    }
    entries = [entry for one in lists.values() for entry in one if isinstance(entry, dict)]
    named = [entry.get("chat_template", keys.get("chat_template")) for entry in entries]
    if not named or not isinstance(named[0], str) or any(name != named[0] for name in named):
        return keys
    if keys.get("chat_template") not in (None, named[0]):
        return keys
    stripped = {
        key: [
            {name: one for name, one in entry.items() if name != "chat_template"}
            if isinstance(entry, dict)
            else entry
            for entry in entries
        ]
        for key, entries in lists.items()
    }
    return {**keys, **stripped, "chat_template": named[0]}


def _entry(entry: object) -> Any:
    if not isinstance(entry, dict):
        return entry
    kept = {key: value for key, value in entry.items() if not _is_idle(key, value)}
    if "type" in kept and "format" not in kept:
        kind = kept.pop("type")
        kept["format"] = DATASET_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    for theirs, ours in (("name", "subset"), ("train_on_split", "split")):
        if theirs in kept and ours not in kept:
            kept[ours] = kept.pop(theirs)
    files = kept.get("data_files")
    if kept.get("path") in READERS and isinstance(files, str | list):
        names = files if isinstance(files, list) else [files]
        if len(names) == 1:
            kept |= {"path": names[0]}
            del kept["data_files"]
    columns = {
        field: kept.pop(key)
        for key, field in COLUMNS.items()
        if key in kept and isinstance(kept[key], str)
    }
    columns = {field: column for field, column in columns.items() if field != column}
    if columns and "columns" not in kept:
        kept["columns"] = columns
    return kept


def _is_idle(key: str, value: object) -> bool:
    if key == "message_property_mappings" and isinstance(value, dict):
        return all(_is_idle(f"message_field_{name}", column) for name, column in value.items())
    if key == "roles" and isinstance(value, dict):
        return all(
            isinstance(names, list) and set(map(str, names)) <= ROLES.get(role, set())
            for role, names in value.items()
        )
    if key == "field_messages" and value in STANDARD_CONVERSATIONS:
        return True
    return (key not in OWN_KEYS and value in (None, "", [], {})) or value in DETECTED.get(key, ())


def _unknown_type(kind: object) -> str:
    """Return what is wrong with Axolotl's `type` of a dataset; empty if it has a meaning here."""
    if isinstance(kind, dict):
        return "a type with a prompt of its own"
    is_known = kind in (None, *DATASET_TYPES, *get_args(DatasetFormat))
    return "" if is_known else f"a type of Axolotl that has no counterpart: {kind}"


def unreadable_datasets(value: Any) -> tuple[str, str] | None:
    """Return why a dataset entry is invalid, and the remedy; None if it is valid."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[{", '["')):
        return "it starts like JSON but is not valid JSON", LIST_FORM
    for number, entry in enumerate(value if isinstance(value, list) else [], 1):
        for key in (*DETECTED, "message_property_mappings", "roles"):
            if not isinstance(entry, dict) or key not in entry or _is_idle(key, entry[key]):
                continue
            why = f"entry {number} sets {key} to a value that is not supported"
            return why, REMEDIES.get(key, f"remove {key}")
        if isinstance(entry, dict) and (unknown := _unknown_type(entry.get("type"))):
            return f"entry {number} has {unknown}", OWN_PROMPT
        if isinstance(entry, dict) and "[" in str(entry.get("split", "")):
            return f"entry {number} names a {PART_OF_SPLIT}", WHOLE_SPLIT
        if isinstance(entry, dict) and {"field_chosen", "field_rejected"} & entry.keys():
            why = f"entry {number} holds preferences, and only supervised fine-tuning is done"
            return why, "train preferences elsewhere, such as with TRL"
    return None
