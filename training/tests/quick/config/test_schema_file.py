"""The schema beside config.json is the one that the code makes."""

from __future__ import annotations

import json
from pathlib import Path

from lora_trainer.config.json_schema import json_schema

TRAINING = Path(__file__).resolve().parents[3]


def test_the_schema_file_is_current():
    # Renew it with: lora-trainer schema > config.schema.json
    assert json.loads((TRAINING / "config.schema.json").read_text()) == json_schema()


def test_the_default_config_names_the_schema():
    config = json.loads((TRAINING / "config.json").read_text())
    assert config["$schema"] == "./config.schema.json"
