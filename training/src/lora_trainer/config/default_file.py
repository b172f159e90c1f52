"""The default config file, when no --config is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

NAME = "config.json"
BESIDE = Path(__file__).parents[3] / NAME  # where train_lora.py is


def find_config(environ: Mapping[str, str]) -> tuple[Path | None, str]:
    """Return the config file to use and the reason; None if there is none.

    LORA_TRAINER_CONFIG names it; else it is `config.json` in the current folder, else the one
    beside train_lora.py.
    """
    if named := environ.get("LORA_TRAINER_CONFIG", "").strip():
        return Path(named), "LORA_TRAINER_CONFIG"
    if Path(NAME).is_file():
        return Path(NAME).absolute(), "the current folder's"
    if BESIDE.is_file():
        return BESIDE, "the default job's"
    return None, ""
