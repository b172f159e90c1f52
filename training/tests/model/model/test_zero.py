"""What DeepSpeed is refused for, and what it is told; how it trains is shown by `test_ranks`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import nn

from lora_trainer.config.schema import Config
from lora_trainer.errors import ConfigError, UnavailableError
from lora_trainer.model import zero
from lora_trainer.model.ranks import PeerLostError, Ranks
from support.families import tiny_model

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
    ("installed", "sections", "reasons"),
    [
        (INSTALLED, {}, []),
        (INSTALLED, {"model": {"use_4bit": True}}, ["4 or 8 bits", "--parallelism fsdp"]),
        (INSTALLED, {"model": {"use_8bit": True}}, ["4 or 8 bits", "--parallelism fsdp"]),
        ({"torch": "2.13.0"}, {}, ["needs DeepSpeed", "deepspeed.txt"]),
        (INSTALLED | {"torch": "2.1.2+cu121"}, {}, ["needs torch 2.6", "with torch 2.1.2+cu121"]),
        (INSTALLED | {"torch": "2.6.0"}, {}, []),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    sections: dict[str, Any],
    reasons: list[str],
) -> None:
    printed = refusal(monkeypatch, installed, sections)
    assert all(part in printed for part in reasons)
    assert bool(printed) == bool(reasons)


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.float32, ""), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]
)
def test_a_layer_is_gathered_at_a_time_and_the_next_one_on_its_way(
    dtype: torch.dtype, half: str
) -> None:
    layers = tiny_model("llama").model.layers.to(dtype)
    layer = sum(parameter.numel() for parameter in layers[0].parameters())
    settings = zero._settings(layers, len(layers), "cuda", is_offloaded=False)
    stage = settings["zero_optimization"]
    assert stage["stage"] == 3
    assert stage["stage3_max_live_parameters"] == 2 * layer
    assert stage["stage3_prefetch_bucket_size"] == layer
    assert stage["stage3_param_persistence_threshold"] == layers[0].input_layernorm.weight.numel()
    assert "offload_param" not in stage
    assert [key for key in ("bf16", "fp16") if key in settings] == ([half] if half else [])


def test_offloaded_layers_are_pinned_where_a_gpu_copies_them() -> None:
    layers = tiny_model("llama").model.layers
    for device, is_pinned in (("cuda", True), ("cpu", False)):
        settings = zero._settings(layers, len(layers), device, is_offloaded=True)
        offload = settings["zero_optimization"]["offload_param"]
        assert offload == {"device": "cpu", "pin_memory": is_pinned}


def test_only_modules_whose_weights_are_their_own_and_frozen_are_shared_out() -> None:
    frozen, part = nn.Linear(2, 2), nn.Linear(2, 2)
    frozen.requires_grad_(False)
    part.weight.requires_grad_(False)
    assert zero._is_shared(frozen)
    assert not zero._is_shared(part)
    assert not zero._is_shared(nn.Sequential(frozen))
    # GPT-OSS' attention has weights of its own beside projections that may be adapted.
    around = nn.Sequential(frozen)
    around.register_parameter("sinks", nn.Parameter(torch.zeros(2), requires_grad=False))
    assert not zero._is_shared(around)
    assert not zero._is_shared(nn.Conv1d(2, 2, 1).requires_grad_(False))


def test_experts_that_are_modules_of_their_own_are_refused_for_several_processes() -> None:
    layer = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    with pytest.raises(UnavailableError, match="cannot shard this model"):
        zero.shard_layers(nn.ModuleList([layer]), layer, "cpu", Ranks(0, 2), is_offloaded=False)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (IndexError("tensor of size 0"), UnavailableError),
        (RuntimeError("The size of tensor a (0) must match"), UnavailableError),
        (PeerLostError("gone"), PeerLostError),
        (torch.cuda.OutOfMemoryError("no more"), torch.cuda.OutOfMemoryError),
        (UnavailableError.of("a head that is not known", where="x", why="y"), UnavailableError),
    ],
    ids=str,
)
def test_a_model_that_reads_weights_of_others_is_refused_by_name(
    error: Exception, raised: type[Exception]
) -> None:
    with pytest.raises(raised) as caught, zero.names_what_it_cannot():
        raise error
    is_named = "outside the module" in str(getattr(caught.value, "problems", ""))
    assert is_named is not isinstance(error, raised)
