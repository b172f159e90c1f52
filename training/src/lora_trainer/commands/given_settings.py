"""The settings of `train` and `check`, and what is printed about where they come from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import settings as configuration
from ..config.default_file import find_config
from ..errors import TrainerError
from ..host import streams


def resolved(arguments: Sequence[str], config: Path | None) -> configuration.Settings:
    """Resolve the configuration; without --config, print which file is used."""
    if os.environ.get("LORA_CONTAINER"):
        config = _check_container(config)
    why = ""
    if config is None:
        config, why = find_config(os.environ)
    notes = [f"config: {config} ({why})"] if config is not None and why else []
    try:
        settings = configuration.resolve(config, os.environ, arguments)
        monitoring = settings.config.monitoring
        notes += [f"note: {note}" for note in settings.notes]
        if monitoring.quiet or monitoring.log_format != "text":
            notes = []
    except TrainerError:
        if _wants_quiet(arguments, os.environ):
            notes = []
        raise
    finally:
        for note in notes:
            streams.say(note)
    return settings


def _wants_quiet(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Return whether standard output is for programs, where the settings are not known."""
    words = [part for argument in arguments for part in argument.split("=")]
    is_json = environ.get("LORA_TRAINER_LOG_FORMAT") == "json" or "json" in words
    return is_json or "--quiet" in words or "LORA_TRAINER_QUIET" in environ


def _check_container(config: Path | None) -> Path:
    """Check what Docker gave this container; return its config file."""
    from . import container

    for warning in container.check_container(os.environ):
        streams.complain(f"warning  {warning}")
    if config is not None:
        return config
    config, why = container.find_config(os.environ)
    if why:
        streams.complain(f"config: {config} ({why})")
    return config
