"""Where relative paths start: at the config file's folder, elsewhere at the current one.

What no source names is in the checkout's `public`, where there is one: results, and the
datasets that a name alone stands for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .layers import Given
from .named_templates import NAMES
from .schema import EMBEDDED_MODEL, Config

PUBLIC = Path(__file__).parents[4] / "public"
PLAIN = (
    "datasets_dir", "dataset_cache_dir", "model_cache_dir", "output_dir", "health_token_file",
    "adapter_name_or_path",
)  # fmt: skip
DATASETS = ("dataset", "eval_dataset")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def locate_paths(config: Config, given: Mapping[str, Given]) -> dict[str, Any]:
    """Return the leaves that hold paths, with those paths made absolute.

    Folders and the token's file are always made so. A dataset is looked for beside the
    config file (or in the current folder, if another source or the default names it), then
    in datasets_dir, by default the checkout's; one that looks like a file but is nowhere is
    made absolute too, for the data check to complain about. A model or a chat template is
    taken for a path if it is there, or if it begins with `.`, `/` or `~`. Everything else,
    such as a hub id, is left.
    """
    values: dict[str, Any] = {}
    for section in (config.model, config.lora, config.data, config.output, config.monitoring):
        values |= {leaf: getattr(section, leaf) for leaf in type(section).model_fields}
    located: dict[str, Any] = {}
    for leaf in PLAIN:
        if values[leaf] is not None:
            located[leaf] = absolute(values[leaf], _folder(leaf, given))
    if "output_dir" not in given and (PUBLIC / values["output_dir"]).is_dir():
        located["output_dir"] = str(PUBLIC / values["output_dir"])
    for leaf in ("model_name_or_path", "chat_template"):
        text = values[leaf]
        if text is not None and text not in (EMBEDDED_MODEL, *NAMES):
            path = absolute(text, _folder(leaf, given))
            located[leaf] = path if exists(path) or _is_explicit(text) else text
    for leaf in DATASETS:
        folders = [_folder(leaf, given)]
        folders.append(Path(located.get("datasets_dir", PUBLIC / "datasets")))
        if values[leaf] is not None:
            located[leaf] = _locate_dataset(values[leaf], folders)
    return located


def _folder(leaf: str, given: Mapping[str, Given]) -> Path:
    return given[leaf].folder if leaf in given else Path()


def _locate_dataset(value: Any, folders: list[Path]) -> Any:
    if isinstance(value, list):
        return [_locate_dataset(entry, folders) for entry in value]
    if not isinstance(value, str):
        entry: dict[str, Any] = value.model_dump()
        return entry | {"path": _locate_dataset(entry["path"], folders)}
    tried = [absolute(value, folder) for folder in folders]
    there = next((path for path in tried if exists(path)), None)
    return there or (tried[0] if _looks_local(value) else value)


def _looks_local(text: str) -> bool:
    name = text.lower().removesuffix(".gz")
    return _is_explicit(text) or (name.endswith(DATA_SUFFIXES) and "://" not in text)


def _is_explicit(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def absolute(text: str, folder: Path) -> str:
    """Return a path as absolute, symbolic links kept; a `~` of nobody is left in."""
    # Looking up a user whose name holds a null byte raises; no file has such a name either.
    expanded = text if "\0" in text else os.path.expanduser(text)  # noqa: PTH111
    return os.path.abspath(folder / expanded)  # noqa: PTH100


def exists(path: str) -> bool:
    """Return whether there is something, False too for names that no file can have."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for such names)
