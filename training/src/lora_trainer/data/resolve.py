"""Resolve a dataset's name to a file, a folder of files, or a dataset on the hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import AccessError, DataError
from ..host.addresses import is_address, joined
from ..host.quoting import shell_word

FileKind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"]
KINDS: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}
METADATA_NAMES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
    "heldout": "test",
}
HUB_PREFIX = "hf://"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One dataset as configured.

    `columns` maps a standard field name (messages, prompt, text, ...) to the column
    that holds it. `weight` is how often its rows are used per epoch. A relative
    path is looked for in `datasets_dir` too. `split` and `subset` choose within a hub
    dataset, `split` also among the files of a folder.
    """

    path_or_id: str
    weight: float = 1.0
    format: str = "auto"
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    subset: str | None = None
    max_samples: int | None = None
    datasets_dir: str | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A local file to read; `shown` is its name in messages."""

    path: Path
    shown: str
    kind: FileKind
    is_gzip: bool


def locate(spec: SourceSpec) -> tuple[DataFile, ...] | None:
    """Return the local files of a source, or None for a hub id.

    Raises:
        DataError: a local path does not exist or contains no data.
        AccessError: a folder cannot be listed.
    """
    name = spec.path_or_id
    if name.startswith(HUB_PREFIX):
        return None
    if is_address(name):
        return _copies(spec)
    path = _existing(spec)
    if path is None:
        if _reads_like_hub_id(name):
            return None
        raise DataError.of(
            "the dataset does not exist",
            where=name,
            remedy=_did_you_mean(spec) or "use an existing file or folder, or a hub id",
        )
    if path.is_dir():
        return _files_in(path, spec)
    if not path.is_file():
        raise DataError.of("the dataset is neither a file nor a folder", where=str(path))
    file = _data_file(path, str(path))
    if file is None:
        raise DataError.of(
            "the dataset's file type is not supported",
            where=str(path),
            remedy=f"use a file name that ends in one of {', '.join(KINDS)}, optionally with .gz",
        )
    return (file,)


def _copies(spec: SourceSpec) -> tuple[DataFile, ...]:
    """Return local copies of the files at an address, shown by their addresses."""
    from ..remote.copies import copy_of_data

    address = spec.path_or_id.rstrip("/")
    copy = copy_of_data(address, lambda name: _kind_of(name)[0] is not None)
    files = locate(replace(spec, path_or_id=str(copy), datasets_dir=None)) or ()
    if copy.is_file():
        return tuple(replace(file, shown=address) for file in files)
    return tuple(
        replace(file, shown=joined(address, file.path.relative_to(copy).as_posix()))
        for file in files
    )


def hub_id(spec: SourceSpec) -> str:
    """Return the id on the hub that a source names."""
    return spec.path_or_id.removeprefix(HUB_PREFIX).removeprefix("datasets/")


def near_local_path(spec: SourceSpec) -> str:
    """Return an existing local path with a similar name, or an empty string."""
    for folder in _folders(spec):
        parent = (folder / Path(spec.path_or_id).expanduser()).parent
        try:
            names = sorted(entry.name for entry in parent.iterdir())
        except OSError:
            continue
        near = difflib.get_close_matches(Path(spec.path_or_id).name, names, n=1)
        if near:
            return str(parent / near[0])
    return ""


def _did_you_mean(spec: SourceSpec) -> str:
    near = near_local_path(spec)
    return f"did you mean {near} ?" if near else ""


def _folders(spec: SourceSpec) -> list[Path]:
    return [Path(), *([Path(spec.datasets_dir)] if spec.datasets_dir else [])]


def _existing(spec: SourceSpec) -> Path | None:
    if "\0" in spec.path_or_id:
        return None
    for folder in _folders(spec):
        path = folder / Path(spec.path_or_id).expanduser()
        try:
            path.stat()
        except PermissionError as error:
            raise AccessError.of(
                "no permission to open a parent folder of the dataset",
                where=str(path),
                remedy=f"chmod a+x {shell_word(path.parent)}",
            ) from error
        except (OSError, RuntimeError):
            continue
        return path
    return None


def _reads_like_hub_id(name: str) -> bool:
    """Return whether a name is `owner/name`: no file extension, no local folder of that name."""
    if not HUB_ID.fullmatch(name) or _kind_of(name)[0] is not None:
        return False
    return "/" not in name or not Path(name.split("/", maxsplit=1)[0]).is_dir()


def _kind_of(name: str) -> tuple[FileKind | None, bool]:
    lowered = name.lower()
    is_gzip = lowered.endswith(".gz")
    return KINDS.get(Path(lowered.removesuffix(".gz")).suffix), is_gzip


def _data_file(path: Path, shown: str) -> DataFile | None:
    kind, is_gzip = _kind_of(path.name)
    return DataFile(path, shown, kind, is_gzip) if kind else None


def _files_in(folder: Path, spec: SourceSpec) -> tuple[DataFile, ...]:
    """Return the data files of a split below a folder, in name order."""

    def refuse(error: OSError) -> None:
        raise AccessError.of(
            "a dataset folder cannot be listed",
            where=str(error.filename),
            remedy=f"chmod a+rx {shell_word(error.filename)}",
        ) from error

    candidates: list[DataFile] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            # datasets leaves cache-*.arrow files, transformed copies, beside the data.
            if name.startswith((".", "cache-")) or name in METADATA_NAMES:
                continue
            path = Path(parent) / name
            file = _data_file(path, str(path))
            if file is not None and path.is_file():
                candidates.append(file)
    # A README.txt or LICENSE.txt beside real data is not data.
    files = [file for file in candidates if file.kind != "txt"] or candidates
    if not files:
        raise DataError.of(
            "the dataset folder contains no data files",
            where=str(folder),
            remedy=f"add files that end in one of {', '.join(KINDS)}, optionally with .gz",
        )
    return _of_split(files, folder, spec.split)


def _of_split(files: list[DataFile], folder: Path, split: str) -> tuple[DataFile, ...]:
    """Keep a test file beside the training file out of training."""
    splits = {file: _split_of(file.path.relative_to(folder)) for file in files}
    named = {name for name in splits.values() if name}
    if not named:
        return tuple(files)
    wanted = SPLIT_WORDS.get(split, split)
    chosen = tuple(file for file in files if (splits[file] or "train") == wanted)
    if not chosen:
        raise DataError.of(
            f"the dataset folder has no split {split!r}",
            where=str(folder),
            why=f"its splits are {', '.join(sorted(named))}",
            remedy="set the split to one of them, or use a file instead of the folder",
        )
    return chosen


def _split_of(relative: Path) -> str | None:
    for part in reversed(relative.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
