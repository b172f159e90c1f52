"""What of test_embedded.py imports torch."""

from __future__ import annotations

import json

import pytest

from lora_trainer.config.schema import ModelSection
from lora_trainer.model import embedded, load


@pytest.fixture(scope="module")
def prepared():
    return embedded.prepare(load.default_cache())


def test_the_special_tokens_are_those_of_the_gguf(prepared):
    source = load.locate(ModelSection())
    tokenizer = load.load_tokenizer(source, ModelSection())
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer.pad_token_id == 2
    config = json.loads((prepared / "config.json").read_text())
    assert config["eos_token_id"] == 2
    assert "quantization_config" not in config
