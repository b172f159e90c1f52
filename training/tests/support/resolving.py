"""Short words for resolving a configuration and for what is wrong with it."""

import json

import pytest

from lora_trainer.config.sections import leaf_sections
from lora_trainer.config.settings import resolve
from lora_trainer.errors import ConfigError


def write(folder, content, name="config.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def from_file(folder, content, name="config.json", **sources):
    path = write(folder, content, name)
    return resolve(path, sources.get("environ", {}), sources.get("arguments", []))


def from_arguments(*arguments):
    return resolve(None, {}, arguments)


def problems_of(*sources):
    with pytest.raises(ConfigError) as caught:
        resolve(*sources)
    return caught.value.problems


def problems_in(folder, content, name="config.json"):
    return problems_of(write(folder, content, name), {}, [])


def problem_in(folder, content, name="config.json"):
    problems = problems_in(folder, content, name)
    assert len(problems) == 1, problems
    return problems[0]


def values_of(resolved):
    return {
        leaf: getattr(getattr(resolved.config, section), leaf)
        for leaf, section in leaf_sections().items()
    }
