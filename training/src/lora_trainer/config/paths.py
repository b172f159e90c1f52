"""Resolve relative paths: from the config file's folder, otherwise from the current one.

Without a setting, results and datasets given by name are in the checkout's `public`, if there is
one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..host.addresses import is_address
from .layers import Given
from .named_templates import NAMES
from .schema import EMBEDDED_MODEL, Config

PUBLIC = Path(__file__).parents[4] / "public"
PLAIN = (
    "datasets_dir", "dataset_cache_dir", "model_cache_dir", "output_dir", "output_cache_dir",
    "health_token_file", "adapter_name_or_path",
)  # fmt: skip
ADDRESSES = ("output_dir", "adapter_name_or_path")  # of an object store, instead of a path
DATASETS = ("dataset", "eval_dataset")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


def locate_paths(config: Config, given: Mapping[str, Given]) -> dict[str, Any]:
    """Return the leaves that contain paths, with absolute paths.

    Folders and the token file always become absolute. A dataset is looked up beside the config file
    (or in the current folder, if another source or the default names it), then in datasets_dir, by
    default the checkout's; a missing file becomes absolute too, and the data check reports it. A
    model or chat template is a path if it exists or starts with `.`, `/` or `~`. Everything else,
    such as a hub id, is unchanged.
    """
    values: dict[str, Any] = {}
    for section in (config.model, config.lora, config.data, config.output, config.monitoring):
        values |= {leaf: getattr(section, leaf) for leaf in type(section).model_fields}
    located: dict[str, Any] = {}
    for leaf in PLAIN:
        if values[leaf] is not None and not (leaf in ADDRESSES and is_address(values[leaf])):
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
    """Return an absolute path, keeping symbolic links and the `~` of an unknown user."""
    # Looking up a user name with a null byte raises; no file has such a name either.
    expanded = text if "\0" in text else os.path.expanduser(text)  # noqa: PTH111
    return os.path.abspath(folder / expanded)  # noqa: PTH100


def exists(path: str) -> bool:
    """Return whether a path exists; False for names that no file can have."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for such names)
