"""Find and read the config file into a layer of values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AccessError, ConfigError, Problem
from . import torchtune
from .aliases import ALIASES
from .dataset_entries import with_one_template
from .layers import Layer, given_text, unknown_key
from .sections import section_names
from .text import MAX_BYTES, Document, read_json, read_yaml
from .trainers import Trainer, complete, recognise

SUFFIXES = (".json", ".yaml", ".yml")
DTYPE_KEYS = ("dtype", "torch_dtype")
OF_TRANSFORMERS = ("llamafactory", "trl", "transformers")  # that read TrainingArguments


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a config file gives, the other trainer whose file it is, and its keys as they are."""

    layer: Layer
    trainer: Trainer | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)


def read_file(path: Path, file_format: str = "") -> ConfigFile:
    """Return the values of a config file, JSON or YAML; `file_format` says whose it is.

    Keys may be in their section or at the top level. A file of another trainer gets that trainer's
    defaults.

    Raises:
        ConfigError: the file does not exist or cannot be decoded.
        AccessError: no permission to read it.
    """
    layer = Layer("file", path.parent)
    document = parse(_read_text(path), path)
    layer.problems += document.problems
    if document.value is not None and not isinstance(document.value, dict):
        what = f"the configuration is {given_text(document.value)}, not an object of keys"
        layer.problems.append(Problem(what, document.location(())))
        return ConfigFile(layer)
    keys: dict[str, Any] = document.value or {}
    trainer = recognise(keys, file_format)
    if trainer is not None and trainer.name == "torchtune" and keys:
        torchtune.take(layer, document)
    else:
        for key, value in with_one_template(keys).items():
            if trainer is not None and (key in trainer.reads or _is_idle_precision(key, keys)):
                continue
            if not _is_superseded(layer, document, key, keys):
                _take(layer, document, key, value)
    _settle_warmup(layer, trainer)
    if trainer is not None:
        complete(layer, trainer, keys, path)
    return ConfigFile(layer, trainer, keys)


def _settle_warmup(layer: Layer, trainer: Trainer | None) -> None:
    """Keep one length of the warmup: in transformers, steps win over a share unless they are 0."""
    steps, share = layer.given.get("warmup_steps"), layer.given.get("warmup_ratio")
    if steps is None or share is None:
        return
    if steps.value == 0:
        del layer.given["warmup_steps"]
    elif share.value == 0 or (trainer is not None and trainer.name in OF_TRANSFORMERS):
        del layer.given["warmup_ratio"]


def _is_idle_precision(key: str, keys: Mapping[str, Any]) -> bool:
    """Return whether another key of the same file decides the precision.

    Elsewhere a dtype is that of the weights, and bf16 or fp16, if true, that of the computation.
    """
    is_set = any(keys.get(name) in (True, "auto") for name in ("bf16", "fp16"))
    if key in DTYPE_KEYS:
        return is_set
    has_dtype = any(keys.get(name) not in (None, "auto") for name in DTYPE_KEYS)
    return key in ("bf16", "fp16") and not is_set and has_dtype


def _is_superseded(layer: Layer, document: Document, key: str, keys: Mapping[str, Any]) -> bool:
    """Return whether a strategy of the Trainer makes a number of steps idle."""
    names = {
        "eval_steps": ("eval_strategy", "evaluation_strategy"),
        "save_steps": ("save_strategy",),
    }
    for strategy in names.get(key, ()):
        if keys.get(strategy) in ("no", False, "epoch"):
            why = f"{strategy} is {keys[strategy]}"
            layer.warnings.append(f"{document.location((key,))}: {key} has no effect: {why}")
            return True
    return False


def parse(text: str, path: Path) -> Document:
    """Return the text of a config file as a document: JSON by its suffix or its first brace.

    YAML in a file named .json is accepted: in a container every config has that name.
    """
    suffix = path.suffix.lower()
    is_json = suffix == ".json" or (suffix not in SUFFIXES and text.lstrip().startswith("{"))
    is_json = is_json and not _begins_with_key(text)
    return read_json(text, str(path)) if is_json else read_yaml(text, str(path))


def _begins_with_key(text: str) -> bool:
    """Return whether the first non-comment line is a YAML key."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith(("#", "---"))), "")
    return bool(re.match(r"[A-Za-z_]\w*:(\s|$)", first))


def _take(layer: Layer, document: Document, key: str, value: object) -> None:
    location = document.location((key,))
    if key == "$schema":
        return
    if key in section_names() and isinstance(value, dict):
        for inner, inner_value in value.items():
            pointer = (key, inner)
            location = document.location(pointer)
            layer.add(inner, inner_value, location, section=key, document=document, pointer=pointer)
    elif key in section_names() and key not in ALIASES:
        if value is not None:
            what = f"{key} is a section and cannot be {given_text(value)}"
            remedy = "write its keys under it, or at the top level"
            layer.problems.append(Problem(what, location, remedy=remedy))
    elif isinstance(value, dict) and _nearest_section(key):
        layer.problems.append(unknown_key(key, location))
    else:
        layer.add(key, value, location, document=document, pointer=(key,))


def _nearest_section(key: str) -> bool:
    return bool(difflib.get_close_matches(key[:100], section_names(), n=1, cutoff=0.8))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError.of(f"there is no config file {path}", **_neighbours(path)) from None
    except IsADirectoryError:
        raise ConfigError.of(
            f"the config file {path} is a folder",
            str(path),
            "Docker creates a folder when the file to be mounted does not exist",
            "remove the folder on the host (rmdir) and put the file there, or name a file in it: "
            f"--config {path}/config.json",
        ) from None
    except PermissionError:
        raise AccessError.of(
            f"no permission to read the config file {path}",
            str(path),
            "the permissions of the file or of a parent folder deny access to this user",
            f"chmod a+r {path}",
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "the name is not a valid path"
        raise ConfigError.of(f"the config file {str(path)!r} cannot be read", why=why) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError.of(
            f"the config file {path} is larger than {MAX_BYTES // 1024} KiB",
            str(path),
            "a configuration file has at most a few hundred lines",
            "name the config file, not the dataset",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        remedy = f"save it as UTF-8, e.g. iconv -f latin1 -t utf-8 {path}"
        raise ConfigError.of(
            "the config file is not UTF-8", f"{path}:{line}", f"byte {error.start}", remedy
        ) from None


def _neighbours(path: Path) -> dict[str, str]:
    """Return place and remedy for a missing file, from the names beside it."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES)
    except OSError:
        where = f"{path.parent} is not a readable folder"
        return {"where": where, "remedy": f"ls -ld {path.parent}"}
    close = difflib.get_close_matches(path.name, names, n=3) or names[:5]
    remedy = f"did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    return {"where": str(path), "remedy": remedy if close else f"ls {path.parent}"}
