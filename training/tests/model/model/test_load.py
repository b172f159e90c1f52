"""A base model goes from its files straight to the device, within a shard of host memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_trainer.config.schema import ModelSection
from lora_trainer.model import load
from lora_trainer.model.compat import MAJOR
from support import loads_measured
from support.families import tiny_model
from support.forked import together

OWN_CLASS = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.numbers = sum(p.detach().isfinite().sum().item() for p in self.parameters())
"""
MB = 1_000_000
SHARD = 36 * MB
# What libraries take besides: Python objects, the file's index, buffers.
CONSTANT = 8 * MB


@pytest.fixture(scope="module")
def warmup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write 105 million parameters as float16 and as bfloat16, in seven files each."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    folders = {}
    for name in ("float16", "bfloat16"):
        folders[name] = tmp_path_factory.mktemp("sharded") / name
        model = empty.to(getattr(torch, name)).to_empty(device="cpu")
        model.save_pretrained(folders[name], max_shard_size=SHARD)
        assert len(list(folders[name].glob("*.safetensors"))) == 7
    return folders


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its anonymous memory")
@pytest.mark.parametrize(
    ("stored", "dtype", "device"),
    [
        ("float16", "bfloat16", "meta"),
        ("float16", "float32", "meta"),
        ("bfloat16", "bfloat16", "meta"),
        ("bfloat16", "bfloat16", "cpu"),
    ],
)
def test_weights_reach_the_device_within_a_shard_of_host_memory(
    sharded: dict[str, Path], warmup: Path, tmp_path: Path, stored: str, dtype: str, device: str
) -> None:
    (taken,) = together(
        1, tmp_path / "run", loads_measured.measured, sharded[stored], warmup, dtype, device
    )
    assert taken["devices"] == [device]
    assert taken["dtypes"] == [f"torch.{dtype}"]
    assert taken["bytes"] > 5 * SHARD
    assert taken["peak"] <= SHARD + CONSTANT


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its anonymous memory")
def test_conversion_on_the_cpu_takes_the_model_and_a_shard_at_most(
    sharded: dict[str, Path], warmup: Path, tmp_path: Path
) -> None:
    (taken,) = together(
        1, tmp_path / "run", loads_measured.measured, sharded["float16"], warmup, "float32", "cpu"
    )
    assert taken["peak"] <= taken["bytes"] + 2 * SHARD + CONSTANT


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "cohere"])
def test_loaded_model_has_the_files_weights_and_the_models_own_ties(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


@pytest.mark.skipif(MAJOR >= 5, reason="transformers 5 builds every class on the meta device")
def test_class_of_a_repository_may_look_at_its_weights_while_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers takes the class for every later Llama of this process.
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(OWN_CLASS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_base(tmp_path, trust_remote_code=True).numbers > 0


def load_base(folder: Path, **keys: bool) -> Any:
    section = ModelSection(model_name_or_path=str(folder), **keys)
    source = load.ModelSource(str(folder), folder.name)
    return load.load_model(source, section, dtype=torch.float32, device="cpu", attention="eager")
