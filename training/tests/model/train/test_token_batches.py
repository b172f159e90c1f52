"""Losses, gradients and scores do not depend on how a step is cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.data.batches import RowView, cut_by_tokens
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.forward import CausalLM
from lora_trainer.train import evaluate
from support.families import tiny_model
from support.plain_peft import make_rows, ours

PER_STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
ROWS = make_rows()  # of 4 to 19 tokens


def trained(folder: Path, tokens: int | str, **own: Any) -> tuple[list[float], dict[str, Any]]:
    settings = PER_STEP | {"max_steps": 3, "max_tokens_per_micro_batch": tokens}
    model, padding_free = tiny_model(own.get("family", "llama")), own.get("padding_free", True)
    losses, adapter, _ = ours(
        model, ROWS, folder, padding_free=padding_free, lora=LoraSection(lora_r=4), own=settings
    )
    return losses, adapter


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_losses_are_equal_whatever_the_cut(tmp_path: Path, family: str, padding_free: bool) -> None:
    own = {"family": family, "padding_free": padding_free}
    runs = [trained(tmp_path / str(n), n, **own) for n in (0, 1, 33, "auto")]
    for losses, adapter in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-6)
        for name, tensor in adapter.items():
            torch.testing.assert_close(tensor, runs[0][1][name], atol=1e-4, rtol=0)


def step_gradients(causal: CausalLM, budget: int) -> list[torch.Tensor]:
    """Return the gradients of one step of all rows, cut by tokens."""
    parameters = trainable_parameters(causal.model).values()
    for parameter in parameters:
        parameter.grad = None
    lengths = [len(ids) for ids, _ in ROWS]
    is_padded = causal.packed is None
    for piece in cut_by_tokens(lengths, budget, is_padded=is_padded):
        causal.loss(evaluate.take(ROWS, piece), 1 / sum(lengths)).backward()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


# Padded rows of Gemma 2 have no number in float64: its softmax is in float32, where the least
# float64, which masks them, is infinite.
@pytest.mark.parametrize(
    ("family", "padding_free"), [("llama", True), ("gemma2", True), ("llama", False)]
)
def test_gradients_in_float64_are_equal_whatever_the_cut(family: str, padding_free: bool) -> None:
    model = add_adapter(tiny_model(family).double(), LoraSection(lora_r=4), seed=1).double()
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    causal = CausalLM(model, device="cpu", padding_free=padding_free, chunk=7, precision="float32")
    whole = step_gradients(causal, 10_000)
    assert whole[0].dtype == torch.float64
    # transformers' norms compute in float32 where examples are padded.
    tolerance = 1e-13 if padding_free else 1e-7
    assert all(gradient.abs().max() > 100 * tolerance for gradient in whole)
    for budget in (1, 33, 80):
        for cut, gradient in zip(step_gradients(causal, budget), whole, strict=True):
            torch.testing.assert_close(cut, gradient, atol=tolerance, rtol=0)


def counted(causal: CausalLM, name: str) -> list[Any]:
    """Return the micro-batches that reach a method from now on."""
    sound, seen = getattr(causal, name), []

    def count(batch: Any, *rest: Any) -> Any:
        seen.append(batch)
        return sound(batch, *rest)

    setattr(causal, name, count)
    return seen


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
def test_evaluation_by_tokens_gives_the_score_of_one_by_examples(padding_free: bool) -> None:
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=1)
    causal = CausalLM(model, device="cpu", padding_free=padding_free, chunk=7, precision="float32")
    seen = counted(causal, "score")
    rows = RowView(ROWS, torch.arange(len(ROWS)).numpy())
    by_examples = evaluate.score(causal, rows, batch_examples=4)
    first, count = seen[0], len(seen)
    seen.clear()
    by_tokens = evaluate.score(causal, rows, batch_examples=4, is_by_tokens=True)
    assert by_examples is not None
    assert by_tokens is not None
    assert by_tokens.loss == pytest.approx(by_examples.loss, abs=1e-6)
    assert by_tokens.token_accuracy == by_examples.token_accuracy
    assert len(seen) < count
    sizes = [one.tokens if padding_free else len(one.ids) * max(map(len, one.ids)) for one in seen]
    most = first.tokens if padding_free else 4 * max(map(len, first.ids))
    assert max(sizes) <= most
