"""Every preset under configs/ is valid, and trains once it is scaled down."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lora_trainer.commands.check import preflight
from lora_trainer.config.schema import Config
from lora_trainer.config.sections import leaf_sections
from lora_trainer.config.settings import resolve
from lora_trainer.machine import Gpu, Machine
from lora_trainer.memory_estimate import DataProfile, ModelSize
from lora_trainer.model import quantize
from lora_trainer.model.footprint import Footprint
from lora_trainer.plan import make_plan
from lora_trainer.run.events import Event, StepDone, Warned
from lora_trainer.train import session as sessions
from lora_trainer.train.dry_run import _unloaded
from lora_trainer.train.loop import train
from support.config import SPECIFIED
from support.tiny_model import write_model, write_rows

FOLDER = Path(__file__).resolve().parents[3] / "configs"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.json"))
# Llama 2 7B: 32 layers, 2 x 131 million parameters in embeddings and head.
LLAMA = ModelSize("llama", 32, 4096, 32000, 6_738_415_616, 39_976_960, 4096, 262_410_240)


def resolved(name: str, *arguments: str) -> Config:
    path = FOLDER / f"{name}.json"
    return resolve(path, environ={}, arguments=list(arguments)).config


def test_the_presets_that_users_expect_are_there_and_explained():
    expected = {"llama-2-7b-qlora", "low-memory", "fast", "multi-gpu"}
    assert expected <= set(PRESETS)
    table = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[([\w-]+)\.json\]", table, re.MULTILINE)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_passes_the_checks_of_a_config(name):
    path = FOLDER / f"{name}.json"
    assert json.loads(path.read_text())["$schema"] == "../config.schema.json"
    resolved = resolve(path, environ={}, arguments=[])
    assert not resolved.warnings
    # Flash attention is not required: a machine without it would refuse the preset.
    assert resolved.config.model.use_flash_attention == "auto"


def test_presets_do_what_their_names_say():
    low, fast = resolved("low-memory"), resolved("fast")
    assert low.model.use_4bit
    training = low.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 2)
    assert low.data.max_seq_length == 1024
    assert (fast.training.per_device_train_batch_size, fast.training.num_train_epochs) == (16, 1)
    assert fast.monitoring.logging_steps == 50
    assert resolved("multi-gpu").training.nproc == "auto"


def test_llama_2_7b_in_4_bits_is_planned_into_16_gb():
    config = resolved("llama-2-7b-qlora")
    machine = Machine(8, 64 << 30, (Gpu(0, "a GPU of 16 GB", 16 << 30, (8, 6)),))
    data = DataProfile(rows=1000, tokens=500_000, supervised_tokens=100_000, longest=2048)
    base = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    footprint = Footprint(
        config, base, partial(_unloaded, config), device="cuda", precision="bfloat16",
        attention="sdpa", padding_free=True,
    )  # fmt: skip
    plan = make_plan(
        config, machine, LLAMA, data, precision="bfloat16", attention="", padding_free=True,
        count=footprint,
    )  # fmt: skip
    assert footprint.faults == ()
    assert 6e9 < plan.estimated_memory_bytes < 16e9


@pytest.mark.parametrize("name", PRESETS)
def test_scaled_down_preset_trains(name, tmp_path):
    config = resolved(name)
    if quantize.is_quantized(config.model) and not quantize.works_on_cpu():
        pytest.skip("this stack's bitsandbytes does not train on a CPU")
    scaled = {
        "model_name_or_path": str(write_model(tmp_path / "model")),
        "dataset": str(write_rows(tmp_path / "rows.jsonl", 0, 64)),
        "eval_dataset": None,
        "dataset_cache_dir": str(tmp_path / "cache"),
        "preprocessing_num_workers": 1,
        "max_seq_length": 128,
        "max_steps": 6,
        "learning_rate": 0.02,
        "warmup_ratio": 0.0,
        "logging_steps": 1,
        "eval_steps": 0,
        "bf16": False,
    }
    _, events = trained(config, scaled, tmp_path / "out")
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def trained(config: Config, scaled: dict[str, Any], output: Path) -> tuple[Any, list[Event]]:
    """Train in this process with other values of some keys; return session and events."""
    content = config.model_dump()
    for leaf, value in scaled.items():
        content[leaf_sections()[leaf]][leaf] = value
    events: list[Event] = []
    output.mkdir()
    session = sessions.open_session(Config.model_validate(content), output, events.append)
    train(session.context(events.append, lambda: False), session.restore(None))
    return session, events


@pytest.mark.parametrize("snippet", SPECIFIED, ids=["low memory", "fast"])
def test_config_of_the_specification_passes_the_checks_and_trains_on_every_stack(snippet, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(snippet))
    settings = resolve(path, {}, ["--output_dir", str(tmp_path / "checked")])
    preflight(settings)
    scaled = {
        "model_name_or_path": str(write_model(tmp_path / "model")),
        "dataset": str(write_rows(tmp_path / "rows.jsonl", 0, 64)),
        "dataset_cache_dir": str(tmp_path / "cache"),
        "preprocessing_num_workers": 1,
        "max_steps": 2,
    }
    session, events = trained(settings.config, scaled, tmp_path / "out")
    assert session.plan.step_examples == snippet["per_device_train_batch_size"] * snippet.get(
        "gradient_accumulation_steps", 1
    )
    warned = " ".join(event.message for event in events if isinstance(event, Warned))
    if "use_flash_attention" in snippet and not session.plan.attention.startswith("packed flash"):
        assert "use_flash_attention: PyTorch's own attention" in warned
    if "use_4bit" in snippet:
        layers = [m for m in session.causal.model.modules() if quantize.is_quantized_linear(m)]
        assert bool(layers) is quantize.works_on_cpu()
        assert ("UNQUANTIZED" in warned) is not quantize.works_on_cpu()
        is_said = any("UNQUANTIZED" in reason for reason in session.plan.reasons)
        assert is_said is not quantize.works_on_cpu()
