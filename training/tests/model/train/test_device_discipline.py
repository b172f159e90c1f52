"""No tensor of the host meets one of the GPU, and the host waits for the GPU seldom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import flash, samples
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.compat import MAJOR, enable_checkpointing
from lora_trainer.model.forward import CausalLM
from lora_trainer.train import loop
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.fitting import Fitting
from lora_trainer.train.optim import make_optimizer
from support.device_watch import TwoDevicesError, meta_as_gpu
from support.families import FAMILIES, tiny_model
from support.flash_operator import IS_FIRST
from support.training_loop import make_context

WAYS = ("packed", "padded", "whole", "one by one", "kernel")
KERNEL = flash.PYTORCH_1 if IS_FIRST else flash.PYTORCH
OTHERS: dict[str, Any] = {
    "gpt-neox": ("GPTNeoX", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(autouse=True)
def other_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in OTHERS.items():
        monkeypatch.setitem(FAMILIES, name, family)


def on_meta(family: str, way: str = "packed", *, dropout: float = 0.0) -> CausalLM:
    """Return a family's adapted model as a GPU would hold it, on one of the ways."""
    if way == "kernel" and IS_FIRST:
        pytest.skip("torch 2.1 has no such kernel on the meta device")
    if family == "mixtral" and MAJOR < 5:
        pytest.skip("torch 2.1 computes no one_hot on the meta device")
    base = tiny_model(family)
    if family == "mixtral":
        base = base.to(torch.bfloat16)  # grouped products on the meta device take nothing else
    section = LoraSection(lora_r=4, lora_dropout=dropout)
    model = add_adapter(base, section, seed=1).to("meta")
    causal = CausalLM(
        model,
        device="meta",
        padding_free=way in ("packed", "kernel"),
        chunk=5,
        precision="float32",
        kernel=flash.VariableLength(KERNEL) if way == "kernel" else None,
    )
    if way in ("whole", "one by one"):
        causal.use_whole_forward("a test asks for it")
        causal.is_one_by_one = way == "one by one"
    causal.model.train()
    return causal


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64, device="meta")


def test_a_tensor_of_the_host_in_an_operation_of_the_gpu_is_refused() -> None:
    with meta_as_gpu() as watch:
        with pytest.raises(TwoDevicesError, match="add"):
            _ = ones(3) + torch.ones(3)
        with pytest.raises(TwoDevicesError, match="index"):
            _ = ones(3)[torch.tensor([0, 1])]
        _ = ones(3) + torch.ones(3).to("meta")
    assert watch.uploads == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda: float(ones(3).sum()),
        lambda: ones(3).tolist(),
        lambda: ones(3).nonzero(),
        lambda: torch.ones(3).to("meta"),
        lambda: torch.tensor([1, 2], device="meta"),
    ],
    ids=["item", "list", "nonzero", "copy", "tensor"],
)
def test_whatever_makes_the_host_wait_is_counted(wait: Callable[[], object]) -> None:
    with meta_as_gpu() as watch:
        wait()
    assert sum(watch.waits.values()) == 1


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_training_with_recomputed_activations_stays_on_one_device(family: str) -> None:
    causal = on_meta(family)
    enable_checkpointing(causal.inner)
    with meta_as_gpu():
        causal.loss(samples.random_examples(causal.inner)).backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gemma2", "gpt-neox"])
def test_each_way_trains_and_scores_on_one_device(family: str, way: str) -> None:
    causal = on_meta(family, way, dropout=0.1)
    batch = samples.random_examples(causal.inner)
    with meta_as_gpu():
        causal.loss(batch).backward()
        causal.score(batch)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", *OTHERS])
def test_generating_a_token_stays_on_one_device(family: str) -> None:
    causal = on_meta(family)
    with meta_as_gpu(), causal.generating() as model:
        model.generate(
            input_ids=ones(2, 5), attention_mask=ones(2, 5), max_new_tokens=2, do_sample=False
        )


@pytest.mark.parametrize("way", WAYS[:3])
def test_scoring_a_batch_waits_once_for_all_its_figures(way: str) -> None:
    causal = on_meta("llama", way)
    with meta_as_gpu() as watch:
        causal.score(samples.random_examples(causal.inner))
    assert sum(watch.waits.values()) == 1


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("way", "uploads"), [("packed", 1), ("kernel", 2)])
def test_a_training_step_waits_for_its_loss_and_its_norm_alone(
    way: str, uploads: int, precision: str, tmp_path: Path
) -> None:
    context, _ = make_context(
        tmp_path,
        precision=precision,
        gradient_accumulation_steps=3,
        max_tokens_per_micro_batch=0,
    )
    causal = on_meta("llama", way)
    parameters = trainable_parameters(causal.model)
    optimizer = make_optimizer(parameters, context.training)
    context = replace(context, causal=causal, parameters=parameters, optimizer=optimizer)
    fitting = Fitting(context.plan, causal, context.ranks, context.emit, context.keep_limits)
    with meta_as_gpu() as watch:
        loop._step(context, TrainState(), fitting)
    assert watch.waits == {"_to_copy to host": 1}  # both at once
    assert watch.uploads == 3 * uploads  # its numbers, and where examples begin
