"""Every argument of another trainer is taken, ignored with a reason or refused with a remedy."""

import json
from pathlib import Path

import pytest

from lora_trainer.config.compatibility import NO_MEANING, Ignored, Refused, interpret
from lora_trainer.config.sections import leaf_sections

TABLE = json.loads((Path(__file__).parents[2] / "support" / "arguments.json").read_text())
ARGUMENTS = {name: sorted(arguments) for name, arguments in TABLE.items()}
DEFAULTS = [(name, key, value) for name, table in TABLE.items() for key, value in table.items()]


@pytest.mark.parametrize("trainer", ARGUMENTS)
def test_no_argument_of_a_trainer_is_unknown(trainer):
    unknown = [
        key
        for key in ARGUMENTS[trainer]
        if interpret(key, "probe") is None and interpret(key, None) is None
    ]
    assert unknown == []


@pytest.mark.parametrize("trainer", ARGUMENTS)
def test_an_argument_at_its_default_is_never_refused(trainer):
    refused = [
        key
        for name, key, value in DEFAULTS
        if name == trainer and isinstance(interpret(key, value), Refused)
    ]
    assert refused == []


def test_what_is_ignored_or_refused_has_a_reason_and_what_is_refused_a_remedy():
    for key in NO_MEANING:
        meaning = interpret(key, "probe")
        if isinstance(meaning, Ignored):
            assert meaning.reason, key
        elif isinstance(meaning, Refused):
            assert meaning.why, key
            assert meaning.remedy, key


def test_a_key_is_either_one_of_ours_or_has_no_meaning():
    assert not leaf_sections().keys() & NO_MEANING.keys()
