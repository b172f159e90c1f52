"""The model card is filled in, valid for the hub, and holds no secret."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from lora_trainer.config.schema import EMBEDDED_MODEL
from lora_trainer.report.model_card import CardFacts, write_model_card

FACTS = CardFacts(
    run_name="lights",
    base_model="/models/smol",
    base_model_hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    base_model_license="apache-2.0",
    data_digest="0123abcd",
    dataset_hub_ids=("owner/rows",),
    train_rows=480,
    train_tokens=28_000,
    eval_rows=60,
    steps=120,
    hyperparameters={"lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"]},
    metrics_before={"exact_match": 0.0, "eval_loss": 3.25},
    metrics_after={"exact_match": 0.95, "eval_loss": 0.125},
    versions={"peft": "0.21.2"},
)


@pytest.fixture
def card(tmp_path):
    def written(**changes) -> ModelCard:
        path = tmp_path / "README.md"
        write_model_card(path, replace(FACTS, **changes))
        return ModelCard.load(path)

    return written


def test_front_matter_names_base_model_library_and_licence(card):
    data = card().data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.library_name, data.license) == ("peft", "apache-2.0")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["owner/rows"]
    assert "lora" in data.tags


def test_a_local_base_model_is_not_named_in_the_front_matter(card):
    assert card(base_model_hub_id=None).data.base_model is None


def test_a_local_dataset_is_not_named_in_the_front_matter(card):
    assert card(dataset_hub_ids=("/home/me/rows.jsonl", "../rows")).data.datasets is None


def test_an_unknown_licence_leaves_the_field_out(card):
    assert card(base_model_license=None).data.license is None


def test_a_licence_without_hub_identifier_becomes_other_with_a_name(card):
    data = card(base_model_license="My Own: Licence").data
    assert (data.license, data.license_name) == ("other", "my-own-licence")


def test_tables_hold_hyperparameters_counts_and_versions(card):
    text = card().text
    assert "| `lora_target_modules` | `q_proj, v_proj` |" in text
    assert "| Rows | 480 |" in text
    assert "| `peft` | `0.21.2` |" in text


def test_results_stand_before_beside_after(card):
    text = card().text
    assert "| exact match | 0.0 % | 95.0 % |" in text
    assert "| loss | 3.25 | 0.125 |" in text


def test_the_usage_example_is_valid_python(card):
    text = card(base_model_revision="it's").text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "PeftModel.from_pretrained" in code


def test_the_card_says_what_vllm_cannot_serve(card):
    assert "vLLM does not load adapters with DoRA or modules_to_save" in (
        card(use_dora=True, modules_to_save=("lm_head",)).text
    )
    text = card(target_parameters=("experts.down_proj",)).text
    assert "It adapts parameters (experts.down_proj)" in text
    assert "vLLM" in text
    assert "vLLM" not in card().text


def test_the_card_says_where_the_embedded_base_model_is(card):
    assert "export RUN TARGET --with-base" in card(base_model=EMBEDDED_MODEL).text
    assert "--with-base" not in card().text


def test_secrets_are_left_out(card):
    assert "hf_abc" not in card(hyperparameters={"hf_token": "hf_abc"}).content


def test_values_cannot_leave_their_table_cell(card):
    text = card(hyperparameters={"chat_template": "a|b\n`</td>`"}).text
    assert "| `chat_template` | `a\\|b '</td>'` |" in text


def test_the_card_replaces_the_template_that_peft_wrote(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("[More Information Needed]")
    write_model_card(path, FACTS)
    assert "More Information" not in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_front_matter_is_plain_yaml_between_dashes(tmp_path):
    path = tmp_path / "README.md"
    write_model_card(path, FACTS)
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert body.lstrip().startswith("# lights")
