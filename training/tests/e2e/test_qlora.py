"""QLoRA on the embedded model: it learns, resumes to the byte, and fits the full base."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_trainer.config.schema import Config
from lora_trainer.model import load, quantize
from lora_trainer.model.forward import CausalLM
from lora_trainer.train import session as sessions
from lora_trainer.train.evaluate import take
from lora_trainer.train.loop import train
from lora_trainer.train.setup import TrainingSetup
from support.checkout import TRAINING

STEPS = 4
# What the weights of the base model come to in memory, as docs/decisions state it.
HELD_MB = {"full": 538.1, "nf4": 168.2, "fp4": 173.1, "8bit": 220.2}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"use_4bit": True},
    "fp4": {"use_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "8bit": {"use_8bit": True, "optim": "adamw_8bit"},
}
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not quantize.works_on_cpu(),
        reason="this stack's bitsandbytes does not train on a CPU",
    ),
]


def config_of(kind: str) -> Config:
    own = dict(KINDS[kind])
    training = {"optim": own.pop("optim", "adamw")}
    return Config.model_validate(
        {
            "model": own | {"bf16": False},
            "lora": {"lora_r": 4, "lora_dropout": 0.05},
            "data": {"dataset": str(TRAINING.parent / "public/datasets/demo/train.jsonl")},
            "training": training
            | {
                "per_device_train_batch_size": 2,
                "max_steps": STEPS,
                "learning_rate": 5e-3,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "loss_chunk_tokens": 16,
            },
            "output": {"save_steps": STEPS // 2},
        }
    )


def run(config: Config, output: Path) -> TrainingSetup:
    """Train, from the newest checkpoint if there is one, without processes around it."""
    session = sessions.open_session(config, output, lambda event: None)
    snapshot, _ = session.store.newest()
    train(session.context(lambda event: None, lambda: False), session.restore(snapshot))
    return session


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mean_loss(causal: CausalLM, session: TrainingSetup) -> float:
    causal.model.eval()
    batch = take(session.splits.train, range(4))
    return causal.score(batch)[0] / batch.targets


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_smollm2_learns_resumes_and_fits_the_full_base(kind: str, tmp_path: Path):
    config, output, resumed = config_of(kind), tmp_path / "whole", tmp_path / "resumed"
    session = run(config, output)
    assert session.causal.packed is not None
    held = quantize.held_bytes(session.causal.inner) - adapter_bytes(session)
    assert held / 1e6 == pytest.approx(HELD_MB[kind], rel=0.01)

    # It fell, on the same rows, in 4 bits.
    with session.causal.model.disable_adapter():
        before = mean_loss(session.causal, session)
    after = mean_loss(session.causal, session)
    assert after < before - 0.3

    # Resumed from the middle, every byte is the same.
    middle, last = f"checkpoints/step-{STEPS // 2:06d}", f"checkpoints/step-{STEPS:06d}"
    shutil.copytree(output / middle, resumed / middle)
    run(config, resumed)
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert digest(resumed / last / name) == digest(output / last / name)

    # Plain PEFT loads it on the base in full precision, where it helps as well.
    session.causal.model.save_pretrained(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(load.locate(config.model).path)
    full = CausalLM(
        PeftModel.from_pretrained(base, str(tmp_path / "adapter")),
        device="cpu", padding_free=True, chunk=64, precision="float32",
    )  # fmt: skip
    with full.model.disable_adapter():
        full_before = mean_loss(full, session)
    assert mean_loss(full, session) < full_before - 0.3


def adapter_bytes(session: TrainingSetup) -> int:
    return sum(p.numel() * p.element_size() for p in session.parameters.values())
