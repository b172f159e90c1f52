"""Any input at all resolves or is a config error, within a second, without torch."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_trainer.config.aliases import ALIASES
from lora_trainer.config.compatibility import NO_MEANING
from lora_trainer.config.sections import leaf_sections
from lora_trainer.config.settings import resolve
from lora_trainer.errors import AccessError, ConfigError
from support.resolving import write

# Anything at all


KEYS = st.sampled_from([*leaf_sections(), *ALIASES, *NO_MEANING, "model", "training", "$schema"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(["auto", "null", "a,b", "-1", "1e999", "{", "[1", "~x", "\0", "\ud800", ""])
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.sampled_from(["path", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def resolve_or_config_error(path, environ, arguments):
    try:
        resolved = resolve(path, environ, arguments)
    except (ConfigError, AccessError) as error:
        assert error.block().encode("utf-8")
    else:
        assert json.dumps(resolved.redacted())


@FAST
@given(content=st.dictionaries(KEYS | st.text(max_size=6), JSON, max_size=5) | JSON)
def test_any_json_resolves_or_is_a_config_error(folder, content):
    resolve_or_config_error(write(folder, json.dumps(content)), {}, [])


@FAST
@given(
    content=st.binary(max_size=60)
    | st.text("{}[]:,-&*!'\"#% \n\tab1.e", max_size=40).map(str.encode)
)
@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c"])
def test_any_bytes_resolve_or_are_a_config_error(folder, name, content):
    (folder / name).write_bytes(content)
    resolve_or_config_error(folder / name, {}, [])


@FAST
@given(
    arguments=st.lists(
        KEYS.map("--{}".format)
        | KEYS.map("--no-{}".format)
        | st.tuples(KEYS, WORDS | st.text(max_size=6)).map("--{0[0]}={0[1]}".format)
        | st.sampled_from(["--", "--set", "--set=", "--=", "--.", "--set=.="])
        | WORDS
        | st.text(max_size=10),
        max_size=6,
    )
)
@example(arguments=["--lora_r", "9" * 5000])
def test_any_arguments_resolve_or_are_a_config_error(folder, arguments):
    resolve_or_config_error(None, {}, arguments)


@FAST
@given(
    environ=st.dictionaries(
        KEYS.map(lambda key: f"LORA_TRAINER_{key.upper()}")
        | st.sampled_from(
            ["HF_TOKEN", "HF_TOKEN_FILE", "DATASETS_DIR", "OUTPUT_DIR", "HEALTH_PORT"]
        ),
        WORDS | st.text(max_size=10),
        max_size=4,
    )
)
@example(environ={"LORA_TRAINER_MODEL_NAME_OR_PATH": "~\0"})
def test_any_environment_resolves_or_is_a_config_error(folder, environ):
    resolve_or_config_error(None, environ, [])


def test_an_adapter_at_a_path_that_cannot_be_is_a_config_error(folder):
    resolve_or_config_error(None, {"LORA_TRAINER_ADAPTER_NAME_OR_PATH": "\0"}, [])


def test_half_a_surrogate_pair_is_told_in_a_way_that_prints(folder):
    resolve_or_config_error(write(folder, json.dumps("\ud800")), {}, [])
    resolve_or_config_error(write(folder, {"\ud800": 1}), {}, [])
