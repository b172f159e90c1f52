"""LLaMA-Factory's `dataset: a,b`: names that its dataset_info.json explains.

Source: llamafactory/data/parser.py and its data/README.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Problem
from .layers import Given, did_you_mean

FILE = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SAME = ("system", "history", "tools")
# The names of turns' keys and roles that rows may have here too.
TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"),
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}  # fmt: skip
UNSUPPORTED = {
    "ranking": "it holds preferences, and only supervised fine-tuning is done",
    "script_url": "it is read by Python code of its own",
    "cloud_file_name": "it is in the cloud",
    "folder": "a folder within a hub dataset cannot be named",
}
MEDIA = ("images", "videos", "audios", "chosen", "rejected", "kto_tag")


def read_names(given: dict[str, Given], leaf: str, folder: Path) -> list[Problem]:
    """Replace the dataset names that a file gives by what dataset_info.json says of them."""
    one = given.get(leaf)
    if one is None or one.origin.kind != "file" or not isinstance(one.value, str):
        return []
    names = [name.strip() for name in one.value.split(",") if name.strip()]
    info, fault = _read(folder / FILE)
    if info is None:
        return _as_paths(given, one, names, folder, fault)
    entries, problems = [], []
    for name in names:
        if name not in info:
            if _is_file_or_id(name, one.folder, folder):
                entries.append({"path": name})
                continue
            what = f"{leaf} names {name!r}, which is not in {FILE}"
            remedy = did_you_mean(name, info) or f"known: {', '.join(list(info)[:8])}"
            problems.append(Problem(what, one.location(), f"read from {folder / FILE}", remedy))
            continue
        entry, why = _entry(info[name], folder)
        if why:
            remedy = f"--{leaf} FILE_OR_HUB_ID, or another name of {FILE}"
            problems.append(Problem(f"{leaf} cannot be {name!r}", one.location(), why, remedy))
        else:
            entries.append(entry)
    if entries:
        given[leaf] = Given(leaf, entries, one.origin, one.folder)
    return problems


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        info = json.loads(path.read_text("utf-8"))
    except OSError:
        return None, f"there is no {path} that explains it"
    except ValueError:
        return None, f"{path} is no valid JSON"
    return (info, "") if isinstance(info, dict) else (None, f"{path} holds no object")


def _as_paths(
    given: dict[str, Given], one: Given, names: list[str], folder: Path, fault: str
) -> list[Problem]:
    """Take the names for files and hub ids where nothing explains them."""
    unknown = [name for name in names if not _is_file_or_id(name, one.folder, folder)]
    if unknown:
        what = f"{one.leaf} names {', '.join(map(repr, unknown))}, which is no file"
        remedy = f"--{one.leaf} FILE_OR_HUB_ID, or --datasets_dir with a {FILE}"
        return [Problem(what, one.location(), fault, remedy)]
    if len(names) > 1:
        given[one.leaf] = Given(one.leaf, names, one.origin, one.folder)
    return []


def _is_file_or_id(name: str, *folders: Path) -> bool:
    return "/" in name or "." in name or any((folder / name).exists() for folder in folders)


def _entry(info: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """Return a dataset as an entry of ours, or why it cannot be one."""
    if not isinstance(info, Mapping):
        return {}, f"its entry in {FILE} is no object"
    columns, tags = (
        one if isinstance(one, Mapping) else {} for one in (info.get("columns"), info.get("tags"))
    )
    why = next((why for key, why in UNSUPPORTED.items() if info.get(key)), "")
    if any(columns.get(name) for name in MEDIA):
        why = "it holds media or preferences, and only text is trained on"
    strange = [key for key, value in tags.items() if value not in TAGS.get(key, (value,))]
    if strange:
        key = strange[0]
        why = f"its {key} is {tags[key]!r}, and rows are read with {' or '.join(TAGS[key])}"
    if why:
        return {}, why
    path = info.get("hf_hub_url") or info.get("file_name")
    if not isinstance(path, str):
        return {}, "its entry names no file_name and no hf_hub_url"
    if not info.get("hf_hub_url"):
        path = str((folder / path).absolute())
    kept = {
        "path": path,
        "columns": _columns(info.get("formatting", "alpaca"), columns, tags) or None,
        "subset": info.get("subset"),
        "split": info.get("split"),
        "max_samples": info.get("num_samples"),
        "format": "alpaca" if info.get("formatting", "alpaca") == "alpaca" else None,
    }
    return {key: value for key, value in kept.items() if value is not None}, ""


def _columns(
    formatting: str, columns: Mapping[str, str], tags: Mapping[str, str]
) -> dict[str, str]:
    if formatting == "alpaca":
        named = {ours: columns.get(theirs, "") for theirs, ours in ALPACA.items()}
    else:
        is_openai = tags.get("role_tag") == "role"
        named = {"messages" if is_openai else "conversations": columns.get("messages", "")}
    named |= {key: columns.get(key, "") for key in SAME}
    return {ours: column for ours, column in named.items() if column and ours != column}
