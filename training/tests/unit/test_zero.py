"""What DeepSpeed is refused for, and what it is told; how it trains is shown by `test_ranks`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import nn

from lora_trainer.config import Config
from lora_trainer.errors import ConfigError
from lora_trainer.model import zero

DEEPSPEED = {"training": {"parallelism": "deepspeed"}}
INSTALLED = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"}


def refusal(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], sections: dict[str, Any]
) -> str:
    def answer(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", answer)
    try:
        zero.check(Config.model_validate(DEEPSPEED | sections))
    except ConfigError as error:
        (problem,) = error.problems
        return f"{problem.what} | {problem.why} | {problem.remedy}"
    return ""


@pytest.mark.parametrize(
    ("installed", "sections", "said"),
    [
        (INSTALLED, {}, []),
        (INSTALLED, {"model": {"use_4bit": True}}, ["4 or 8 bits", "--parallelism fsdp"]),
        (INSTALLED, {"model": {"use_8bit": True}}, ["4 or 8 bits", "--parallelism fsdp"]),
        ({"torch": "2.13.0"}, {}, ["needs DeepSpeed", zero.INSTALL]),
        (INSTALLED | {"torch": "2.1.2+cu121"}, {}, ["needs torch 2.6", "with torch 2.1.2+cu121"]),
        (INSTALLED | {"torch": "2.6.0"}, {}, []),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    sections: dict[str, Any],
    said: list[str],
) -> None:
    told = refusal(monkeypatch, installed, sections)
    assert all(part in told for part in said)
    assert bool(told) == bool(said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_gathered_at_a_time_and_the_next_one_on_its_way(dtype: torch.dtype) -> None:
    layers = tiny_model("llama").model.layers.to(dtype)
    layer = sum(parameter.numel() for parameter in layers[0].parameters())
    told = zero._settings(layers, len(layers), "cuda", is_offloaded=False)
    stage = told["zero_optimization"]
    assert stage["stage"] == 3
    assert stage["stage3_max_live_parameters"] == 2 * layer
    assert stage["stage3_prefetch_bucket_size"] == layer
    assert stage["stage3_param_persistence_threshold"] == layers[0].input_layernorm.weight.numel()
    assert "offload_param" not in stage
    assert told["bf16"]["enabled"] is (dtype == torch.bfloat16)


def test_offloaded_layers_are_pinned_where_a_gpu_copies_them() -> None:
    layers = tiny_model("llama").model.layers
    for device, is_pinned in (("cuda", True), ("cpu", False)):
        told = zero._settings(layers, len(layers), device, is_offloaded=True)
        offload = told["zero_optimization"]["offload_param"]
        assert offload == {"device": "cpu", "pin_memory": is_pinned}


def test_only_modules_that_hold_nothing_trained_are_shared_out() -> None:
    frozen, part = nn.Linear(2, 2), nn.Linear(2, 2)
    frozen.requires_grad_(False)
    part.weight.requires_grad_(False)
    assert zero._is_frozen(frozen)
    assert not zero._is_frozen(part)
    assert not zero._is_frozen(nn.Sequential(frozen))
