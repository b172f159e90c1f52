"""Every path that runs the model computes in the same precision, whatever the base is held in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_quantize import load_base, make_batch, needs_bitsandbytes
from transformers import AutoTokenizer

from faults.tiny_model import write_model
from lora_trainer.commands import chat
from lora_trainer.config.schema import LoraSection
from lora_trainer.data.prompt_format import PromptFormat
from lora_trainer.model.adapter import add_adapter
from lora_trainer.model.forward import CausalLM
from lora_trainer.model.probe import verify
from lora_trainer.train import evaluate

BASES = [
    ("float32", {}),
    ("bfloat16", {}),
    pytest.param(("float32", {"use_4bit": True}), marks=needs_bitsandbytes),
    pytest.param(("bfloat16", {"use_4bit": True}), marks=needs_bitsandbytes),
    pytest.param(("float32", {"use_8bit": True}), marks=needs_bitsandbytes),
    pytest.param(("bfloat16", {"use_8bit": True}), marks=needs_bitsandbytes),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("precision") / "model")


@pytest.fixture
def causal(request: pytest.FixtureRequest, folder: Path) -> CausalLM:
    precision, keys = request.param
    base = load_base(folder, getattr(torch, precision), **keys)
    model = add_adapter(base, LoraSection(lora_r=4), seed=1)
    return CausalLM(model, device="cpu", padding_free=True, chunk=5, precision=precision)


@pytest.mark.parametrize("causal", BASES, indirect=True, ids=str)
def test_loss_score_and_probe_work_in_each_precision(causal: CausalLM) -> None:
    assert verify(causal) == ""
    batch = make_batch()
    loss = causal.loss(batch)
    loss.backward()
    score, _ = causal.score(batch)
    assert float(loss.detach()) == pytest.approx(score, rel=2e-2)
    assert all(p.grad is not None for p in causal.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("causal", BASES, indirect=True, ids=str)
def test_answers_are_generated_in_each_precision(causal: CausalLM, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [evaluate.Question(i, [5, 6, 7 + i], [8, 2]) for i in range(3)]
    answers = evaluate.answer(
        causal, tokenizer, asked, ends=[2], batch_examples=2, max_new_tokens=4
    )
    assert answers is not None
    assert len(answers) == 3


@pytest.mark.parametrize("causal", BASES, indirect=True, ids=str)
@pytest.mark.parametrize("is_base", [False, True], ids=["adapter", "base"])
def test_chat_answers_in_each_precision(causal: CausalLM, is_base: bool, folder: Path) -> None:
    opened = SimpleNamespace(
        causal=causal,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        has_adapter=True,
        prompt_format=PromptFormat("text", (2,)),
        stops=[2],
    )
    pieces: list[str] = []
    chat._generate(
        opened, "What follows", chat.Asking(max_new_tokens=4), pieces.append, is_base=is_base
    )
