"""Values from the environment: `LORA_TRAINER_<KEY>` for every key, and a few known names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import Problem
from .aliases import ALIASES
from .layers import Layer, did_you_mean
from .literal import from_text
from .schema import SECRET_KEYS
from .sections import leaf_sections

PREFIX = "LORA_TRAINER_"
# Read elsewhere in the program; not configuration keys.
RESERVED = frozenset(
    f"{PREFIX}{name}" for name in ("CONFIG", "DEBUG", "CACHE", "EVENTS_FD", "EXIT_CODES", "LOG_DIR")
)
# Names shared with other tools; the first one set wins, LORA_TRAINER_* before all.
WELL_KNOWN = (
    ("HF_TOKEN", "hf_token"),
    ("HF_TOKEN_FILE", "hf_token"),
    ("HUGGING_FACE_HUB_TOKEN", "hf_token"),
    ("DATASETS_DIR", "datasets_dir"),
    ("OUTPUT_DIR", "output_dir"),
    ("HEALTH_PORT", "health_port"),
)
MAX_SECRET_BYTES = 64 * 1024


def read_environment(environ: Mapping[str, str]) -> Layer:
    """Return the values of the environment; an empty variable counts as not set."""
    layer = Layer("environment", Path())
    names = {name: leaf for leaf in leaf_sections() for name in _names_of(leaf)}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in RESERVED or not environ[name].strip():
            continue
        if name in names:
            _take(layer, name, names[name], environ[name])
        else:
            layer.problems.append(_unknown(name))
    for name, leaf in WELL_KNOWN:
        if environ.get(name, "").strip() and leaf not in layer.given:
            _take(layer, name, leaf, environ[name])
    return layer


def _names_of(leaf: str) -> list[str]:
    name = PREFIX + leaf.upper()
    return [name, f"{name}_FILE"] if leaf in SECRET_KEYS else [name]


def _unknown(name: str) -> Problem:
    key = name.removeprefix(PREFIX)
    remedy = did_you_mean(key, [*leaf_sections(), *ALIASES], lambda leaf: PREFIX + leaf.upper())
    why = f"variables starting with {PREFIX} set configuration keys"
    return Problem(f"{name} is an unknown setting", name, why, remedy or f"unset {name}")


def _take(layer: Layer, name: str, leaf: str, text: str) -> None:
    if leaf not in SECRET_KEYS:
        layer.add(leaf, from_text(leaf, text), name)
    elif name.endswith("_FILE"):
        secret = _read_secret(layer, name, Path(text))
        if secret:
            layer.add(leaf, secret, name)
    else:
        layer.add(leaf, text.strip(), name)


def _read_secret(layer: Layer, name: str, path: Path) -> str:
    """Return the secret in a file; a missing, empty or invalid file is a problem."""
    why = ""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
        secret = raw.decode().strip()
        if not secret or len(raw) > MAX_SECRET_BYTES:
            why = "it is empty" if not secret else "it is too large for a secret"
    except UnicodeDecodeError:
        why = "it is not UTF-8 text"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "the name is not a valid path"
    if not why:
        return secret
    remedy = f"mount the secret there, or unset {name}"
    what = f"{name} names a file that holds no secret: {str(path)!r}"
    layer.problems.append(Problem(what, name, why, remedy))
    return ""
