"""Merge all sources into one frozen configuration, with the origin of each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, Problem
from .arguments import read_arguments, read_values
from .conflicts import find_conflicts, find_warnings
from .environment import read_environment
from .file import read_file
from .layers import Given, Origin, given_text
from .named_templates import NAMES
from .paths import exists, locate_paths
from .precedence import merge
from .schema import Config
from .sections import leaf_sections, sections
from .start_adapter import adopt
from .trainers import settle, take_format
from .undecodable import find_undecodable, find_undecodable_paths
from .validation import find_misfits


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration, the origin of every leaf, warnings, and notes on what was derived."""

    config: Config
    origins: Mapping[str, Origin]
    config_file: Path | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def redacted(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return section -> leaf -> value and origin, secrets as `***`."""
        return {
            name: {
                leaf: {"value": value, "origin": str(self.origins[leaf])}
                for leaf, value in leaves.items()
            }
            for name, leaves in self.config.masked().items()
        }


def resolve(
    config_file: Path | None,
    environ: Mapping[str, str],
    arguments: Sequence[str],
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Settings:
    """Merge all sources into settings with absolute paths.

    `arguments` are those of a command line, `values` those of a call from Python.

    Raises:
        ConfigError: with every problem of every source.
        AccessError: the config file may not be read.
    """
    file_format, arguments = take_format(arguments)
    layers = [read_environment(environ), read_arguments(arguments), read_values(values)]
    source = None
    if config_file is not None:
        source = read_file(config_file, file_format)
        layers.insert(0, source.layer)
    given, foreign, notes = merge(layers)
    settled = []
    if source is not None and source.trainer is not None and config_file is not None:
        settled = settle(source.trainer, given, source.keys, config_file)
    misfits = find_misfits(given) | find_undecodable(given)
    config = _config_of({leaf: g.value for leaf, g in given.items() if leaf not in misfits})
    problems = [problem for layer in layers for problem in layer.problems]
    problems += [*foreign, *(problem for group in misfits.values() for problem in group)]
    problems += find_conflicts(config, given, set(misfits))
    problems += settled
    located = locate_paths(config, given)
    problems += find_undecodable_paths(located)
    problems += _find_template_problems(located.get("chat_template"), given)
    if problems:
        raise ConfigError(problems)
    known = {leaf: g.value for leaf, g in given.items()} | located
    config = _config_of(known)
    origins = {leaf: given[leaf].origin if leaf in given else Origin() for leaf in leaf_sections()}
    if config.lora.adapter_name_or_path is not None:
        adopted, problems = adopt(config, given)
        if problems:
            raise ConfigError(problems)
        config = _config_of(known | adopted)
        origins |= {
            leaf: Origin("adapter", config.lora.adapter_name_or_path or "") for leaf in adopted
        }
    warnings = [warning for layer in layers for warning in layer.warnings]
    warnings += find_warnings(config, given)
    return Settings(config, origins, config_file, warnings, notes)


def _config_of(values: Mapping[str, Any]) -> Config:
    sorted_in: dict[str, dict[str, Any]] = {name: {} for name in sections()}
    for leaf, value in values.items():
        sorted_in[leaf_sections()[leaf]][leaf] = value
    return Config.model_validate(sorted_in)


def _find_template_problems(template: str | None, given: Mapping[str, Given]) -> list[Problem]:
    """Refuse what is neither a template, nor its name, nor a file that is there."""
    if template is None or template in NAMES or "{" in template or exists(template):
        return []
    return [
        Problem(
            f"chat_template cannot be {given_text(template)}",
            given["chat_template"].origin.location,
            "it is neither Jinja text, nor a file that exists, nor the name of a known template",
            f"set it to {', '.join(NAMES)} or a Jinja file, or remove it: the tokenizer's own "
            "template is used",
        )
    ]
