"""Every path that runs the model computes in the same precision, whatever the base is held in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer, LlamaModel

from lora_trainer.commands import chat
from lora_trainer.commands.finetuned import FinetunedModel
from lora_trainer.commands.merge import merge
from lora_trainer.config.schema import Config, LoraSection, ModelSection
from lora_trainer.data.prompt_format import PromptFormat
from lora_trainer.model import determinism, probe
from lora_trainer.model.adapter import add_adapter
from lora_trainer.model.forward import CausalLM
from lora_trainer.train import evaluate
from support.quantized import load_base, make_batch, needs_bitsandbytes
from support.tiny_model import write_model

needs_float16 = pytest.mark.skipif(
    not hasattr(torch, "get_autocast_dtype"), reason="this torch autocasts to bfloat16 on a CPU"
)
PRECISIONS = {"float32": [], "bfloat16": [], "float16": [needs_float16]}
WEIGHTS = {"plain": [], "use_4bit": [needs_bitsandbytes], "use_8bit": [needs_bitsandbytes]}
BASES = [
    pytest.param((precision, weights), marks=[*marks, *others], id=f"{precision}-{weights}")
    for precision, marks in PRECISIONS.items()
    for weights, others in WEIGHTS.items()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("precision") / "model")


@pytest.fixture
def causal(request: pytest.FixtureRequest, folder: Path) -> CausalLM:
    precision, weights = request.param
    keys = {} if weights == "plain" else {weights: True}
    base = load_base(folder, getattr(torch, precision), **keys)
    model = add_adapter(base, LoraSection(lora_r=4), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=5, precision=precision)
    causal.held_in = keys
    return causal


def loss(causal: CausalLM, *_: Path) -> None:
    batch = make_batch()
    summed = causal.loss(batch)
    summed.backward()
    assert float(summed.detach()) == pytest.approx(causal.score(batch)[0], rel=2e-2)
    assert all(p.grad is not None for p in causal.model.parameters() if p.requires_grad)


def score(causal: CausalLM, *_: Path) -> None:
    assert 0 < causal.score(make_batch())[0] < 1e4


def verify(causal: CausalLM, *_: Path) -> None:
    assert probe.verify(causal) == ""
    assert determinism.require(lambda: probe.exercise(causal)) == ""


def generate(causal: CausalLM, folder: Path, _: Path) -> None:
    asked = [evaluate.Question(i, [5, 6, 7 + i], [8, 2]) for i in range(3)]
    how = {"ends": [2], "batch_examples": 2, "max_new_tokens": 4}
    answers = evaluate.answer(causal, AutoTokenizer.from_pretrained(folder), asked, **how)
    assert len(answers) == 3


def talk(causal: CausalLM, folder: Path, _: Path) -> None:
    tokenizer, form = AutoTokenizer.from_pretrained(folder), PromptFormat("text", (2,))
    opened = SimpleNamespace(
        causal=causal, tokenizer=tokenizer, has_adapter=True, prompt_format=form, stops=[2]
    )
    for is_base in (False, True):
        asking = chat.Asking(max_new_tokens=4)
        chat._generate(opened, "What follows", asking, lambda _: None, is_base=is_base)


PATHS = [loss, score, verify, generate, talk]


@contextlib.contextmanager
def precisions_of_decoders() -> Iterator[set[Any]]:
    """Collect what each decoder that runs meanwhile is autocast to; None: to nothing."""
    seen: set[Any] = set()

    def note(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, LlamaModel):
            is_on = torch.is_autocast_cpu_enabled()
            seen.add(torch.get_autocast_cpu_dtype() if is_on else None)

    hook = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture(autouse=True)
def determinism_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
@pytest.mark.parametrize("causal", BASES, indirect=True)
def test_every_path_computes_in_the_precision_that_was_chosen(
    causal: CausalLM, path: Callable, folder: Path, tmp_path: Path
) -> None:
    with precisions_of_decoders() as seen:
        path(causal, folder, tmp_path)
    assert seen == {None if causal.dtype == torch.float32 else causal.dtype}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.parametrize("causal", BASES, indirect=True)
def test_what_was_trained_in_any_precision_is_merged_and_proven_in_float32(
    causal: CausalLM, folder: Path, tmp_path: Path
) -> None:
    expected = causal.score(make_batch())[0]
    causal.model.save_pretrained(tmp_path / "adapter")
    section = ModelSection(model_name_or_path=str(folder), **causal.held_in)
    trained = FinetunedModel("adapter", Config(model=section), tmp_path / "adapter")
    with precisions_of_decoders() as seen:
        merge(trained, tmp_path / "merged")
    assert seen == {None}
    merged = load_base(tmp_path / "merged")
    whole = CausalLM(merged, device="cpu", padding_free=True, chunk=5, precision="float32")
    assert whole.score(make_batch())[0] == pytest.approx(expected, rel=3e-2)
