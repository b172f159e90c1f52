"""The schema: names, defaults, the digest, the JSON Schema, and the reference's table of keys."""

import json

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from lora_trainer.config.aliases import ALIASES, COMMA_LISTS, CONVERTED_ALIASES
from lora_trainer.config.compatibility import CONVERSIONS, NO_MEANING
from lora_trainer.config.digest_keys import LATER_KEYS, NOT_IN_DIGEST
from lora_trainer.config.json_schema import json_schema
from lora_trainer.config.reference import BEGIN, END, help_text, key_table, replace_block
from lora_trainer.config.schema import (
    Config,
    DataSection,
    LoraSection,
    ModelSection,
    OutputSection,
    TrainingSection,
)
from lora_trainer.config.sections import leaf_sections, section_names, sections
from lora_trainer.config.settings import resolve
from lora_trainer.errors import TrainerError
from support.config import TRAINING

CHECKER = jsonschema.Draft202012Validator(json_schema())


def test_leaf_names_are_unique_over_all_sections():
    leaves = [leaf for kind in sections().values() for leaf in kind.model_fields]
    assert len(leaves) == len(set(leaves))


def test_no_leaf_is_named_as_a_section():
    assert not set(leaf_sections()) & set(section_names())


def test_every_alias_stands_for_a_leaf_and_is_none_itself():
    assert set(ALIASES.values()) <= set(leaf_sections())
    assert not set(ALIASES) & set(leaf_sections())


def test_a_key_without_meaning_is_neither_a_leaf_nor_an_alias():
    assert not set(NO_MEANING) & (set(leaf_sections()) | set(ALIASES))


def test_every_alias_of_another_type_is_translated():
    assert set(CONVERSIONS) == CONVERTED_ALIASES <= set(ALIASES)
    assert set(leaf_sections()) >= COMMA_LISTS


def test_every_key_is_described():
    fields = [field for kind in sections().values() for field in kind.model_fields.values()]
    assert all(field.description for field in fields)


def test_defaults_written_out_are_the_defaults():
    assert Config.model_validate(Config().model_dump()).model_dump_json() == (
        Config().model_dump_json()
    )


def test_default_written_as_a_whole_number_has_the_same_digest():
    assert Config(lora=LoraSection(lora_alpha=32)).digest() == Config().digest()


def test_digest_tells_what_changes_the_weights():
    assert Config(training=TrainingSection(learning_rate=1e-3)).digest() != Config().digest()


def test_digest_overlooks_places_and_secrets():
    config = Config(
        model=ModelSection(hf_token="hf_x", model_cache_dir="/a"),
        data=DataSection(dataset_cache_dir="/b", preprocessing_num_workers=3),
        output=OutputSection(output_dir="/c"),
    )
    assert config.digest() == Config().digest()
    assert all(key in sections()[section].model_fields for section, key in NOT_IN_DIGEST)


def test_a_later_key_at_its_default_leaves_the_digest_of_runs_without_it():
    with_keys = Config().digest()
    for key, default in LATER_KEYS.items():
        assert TrainingSection.model_fields[key].default == default
    assert Config(training=TrainingSection(min_lr_rate=0.1)).digest() != with_keys


def test_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().training.learning_rate = 1.0


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainingSection, {"learning_rate": "0.1"}),
        (TrainingSection, {"max_steps": True}),
        (TrainingSection, {"learning_rate": float("nan")}),
        (LoraSection, {"init_lora_weights": "pissa_niter_0"}),
        (LoraSection, {"lora_r": 4097}),
        (OutputSection, {"run_name": "../up"}),
        (OutputSection, {"unknown": 1}),
    ],
)
def test_silent_conversions_and_values_out_of_range_are_refused(kind, values):
    with pytest.raises(ValidationError):
        kind(**values)


def test_repr_shows_no_secret():
    assert "hf_sesame" not in repr(Config(model=ModelSection(hf_token="hf_sesame")))


def test_json_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"$schema": "x.json", "learning_rate": 1e-4}',
        '{"training": {"learning_rate": 1}, "lora_r": 8}',
        '{"model": "some/model"}',
        '{"model": {"model_name_or_path": "some/model", "bf16": "auto"}}',
        '{"base_model": "a/b", "load_in_4bit": true, "lora_target_linear": true}',
        '{"lora_target": "q_proj,v_proj", "cutoff_len": 512, "flash_attn": "fa2"}',
        '{"quantization_bit": 4, "pissa_init": false, "val_size": 0.1}',
        '{"dataset": ["a.jsonl", {"path": "b/c", "weight": 2, "format": "alpaca"}]}',
        '{"report_to": "none", "modules_to_save": "lm_head"}',
        '{"monitoring": {"report_to": ["wandb"], "health_port": 0}}',
        '{"init_lora_weights": "pissa_niter_16"}',
        '{"dataset_columns": {"prompt": "question"}}',
    ],
)
def test_json_schema_accepts_what_is_resolved(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    resolve(tmp_path / "config.json", {}, [])
    CHECKER.validate(json.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        '{"learning_rat": 1}',
        '{"training": {"lora_r": 1}}',
        '{"lora_r": 0}',
        '{"lr": "fast"}',
        '{"bf16": "yes"}',
        '{"data": "train.jsonl"}',
        '{"dataset": [{"weight": 1}]}',
        '{"init_lora_weights": "pisa"}',
    ],
)
def test_json_schema_refuses_what_is_not_resolved(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TrainerError):
        resolve(tmp_path / "config.json", {}, [])
    assert not CHECKER.is_valid(json.loads(text))


def shipped_configs():
    paths = [*TRAINING.glob("config.json"), *(TRAINING / "configs").glob("*")]
    return [path for path in paths if path.suffix in (".json", ".yaml", ".yml")]


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.name)
def test_shipped_configuration_is_right(path):
    settings = resolve(path, {}, [])
    assert settings.warnings == []
    CHECKER.validate(yaml.safe_load(path.read_text()) if path.suffix != ".json" else
                     json.loads(path.read_text()))  # fmt: skip


def test_table_and_help_name_every_key():
    assert all(f"| `{leaf}` |" in key_table() for leaf in leaf_sections())
    assert all(f"--{leaf}\n" in help_text() for leaf in leaf_sections())


def test_rows_of_the_table_have_equal_cells():
    rows = [line for line in key_table().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}


def test_table_replaces_only_what_stands_between_its_marks():
    renewed = replace_block(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert renewed == f"before\n{BEGIN}\n{key_table()}{END}\nafter\n"
    assert replace_block(renewed) == renewed


def test_reference_holds_the_current_table_of_keys():
    text = (TRAINING.parent / "docs" / "reference.md").read_text("utf-8")
    assert replace_block(text) == text, "run: python -m lora_trainer.config docs/reference.md"
