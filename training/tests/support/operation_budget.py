"""Count the operations of a layer, and keep the count as a budget.

`python tests/support/operation_budget.py` records the counts of the installed libraries. On a GPU
each operation is a kernel launch, and a layer of few tokens is as slow as its launches. Counted on
the CPU, where dropout is four operations instead of one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lora_trainer.config.schema import LoraSection, ModelSection
from lora_trainer.model import flash, load, quantize
from lora_trainer.model.adapter import add_adapter
from lora_trainer.model.compat import enable_checkpointing
from lora_trainer.model.forward import CausalLM, MicroBatch
from support.device_watch import DeviceWatch
from support.flash_operator import IS_FIRST, on_the_cpu

FILE = Path(__file__).with_suffix(".json")
KERNEL = flash.PYTORCH_1 if IS_FIRST else flash.PYTORCH
LENGTHS = (12, 7, 20, 9)
# Counts are those of a model with so many layers less those of one with a layer less.
LAYERS = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is trained, as far as it changes what is computed."""

    precision: str
    use_4bit: bool = False
    dropout: float = 0.0
    has_checkpointing: bool = False
    has_kernel: bool = True  # for variable lengths; else an example at a time


SETTINGS = {
    "bfloat16": Setting("bfloat16"),
    "bfloat16, segments": Setting("bfloat16", has_kernel=False),
    "4-bit": Setting("bfloat16", use_4bit=True),
    "4-bit, segments": Setting("bfloat16", use_4bit=True, has_kernel=False),
    "4-bit, dropout, checkpointing": Setting(
        "bfloat16", use_4bit=True, dropout=0.05, has_checkpointing=True
    ),
    "4-bit, dropout, checkpointing, segments": Setting(
        "bfloat16", use_4bit=True, dropout=0.05, has_checkpointing=True, has_kernel=False
    ),
}


def versions() -> str:
    """Return the libraries that decide which operations there are."""
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def count(setting: Setting) -> dict[str, int]:
    """Return a layer's operations, and those of them that change a type."""
    with on_the_cpu():
        more, less = (_count(setting, layers) for layers in (LAYERS, LAYERS - 1))
    return {name: more[name] - less[name] for name in more}


def _count(setting: Setting, layers: int) -> dict[str, int]:
    causal = _model(setting, layers)
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, 60, length) for length in LENGTHS]
    batch = MicroBatch(ids, [np.ones(length, dtype=bool) for length in LENGTHS])
    causal.loss(batch).backward()  # what is set up once is not counted
    with DeviceWatch(gpu="cpu") as forward:
        loss = causal.loss(batch)
    with DeviceWatch(gpu="cpu") as backward:
        loss.backward()
    return {
        "forward": sum(forward.operations.values()),
        "backward": sum(backward.operations.values()),
        "forward casts": sum(forward.casts.values()),
        "backward casts": sum(backward.casts.values()),
    }


def _model(setting: Setting, layers: int) -> CausalLM:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    dtype = getattr(torch, setting.precision)
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        section = ModelSection(model_name_or_path=folder, use_4bit=setting.use_4bit)
        base = load.load_model(
            load.locate(section), section, dtype=dtype, device="cpu", attention="sdpa"
        )
    lora = LoraSection(lora_r=4, lora_dropout=setting.dropout)
    model = add_adapter(base, lora, seed=1)
    if setting.has_checkpointing:
        enable_checkpointing(base)
    causal = CausalLM(
        model,
        device="cpu",
        padding_free=True,
        chunk=64,
        precision=setting.precision,
        kernel=flash.VariableLength(KERNEL) if setting.has_kernel else None,
    )
    causal.model.train()
    return causal


def budgets() -> dict[str, Any]:
    """Return the recorded counts by versions and setting."""
    return dict(json.loads(FILE.read_text())) if FILE.exists() else {}


if __name__ == "__main__":
    counted = {
        name: count(setting)
        for name, setting in SETTINGS.items()
        if not setting.use_4bit or quantize.works_on_cpu()
    }
    FILE.write_text(json.dumps(budgets() | {versions(): counted}, indent=2) + "\n")
    sys.stdout.write(json.dumps(counted, indent=2) + "\n")
