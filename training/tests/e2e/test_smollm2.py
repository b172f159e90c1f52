"""The real model through our loop and through plain transformers + PEFT: the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_trainer.config.schema import LoraSection, ModelSection
from lora_trainer.model.forward import CausalLM
from lora_trainer.model.load import locate
from lora_trainer.model.probe import verify
from support.plain_peft import make_rows, ours, plain

pytestmark = [pytest.mark.timeout(1200)]


def smollm2():
    model = AutoModelForCausalLM.from_pretrained(
        locate(ModelSection()).path, attn_implementation="sdpa"
    )
    return model.float().requires_grad_(False)


def test_every_step_of_smollm2_equals_plain_transformers(tmp_path: Path):
    torch.set_num_threads(2)
    rows, lora = make_rows(vocabulary=40_000), LoraSection(lora_r=4, lora_alpha=8)
    # AdamW divides a gradient by its own size, so rounding becomes steps of full length: at
    # the tiny models' rate of 5e-3 the losses of these 30 layers drift apart to 8e-5.
    own = {"learning_rate": 2e-4, "max_grad_norm": 1.0}
    losses, adapter, order = ours(smollm2(), rows, tmp_path, padding_free=True, lora=lora, own=own)
    expected, expected_adapter = plain(smollm2(), rows, order, lora=lora, own=own)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, expected_adapter[name], rtol=1e-4, atol=1e-4)


def test_packing_and_head_are_proven_on_smollm2():
    causal = CausalLM(smollm2(), device="cpu", padding_free=True, chunk=64, precision="float32")
    assert verify(causal) == ""
    assert causal.packed is not None
