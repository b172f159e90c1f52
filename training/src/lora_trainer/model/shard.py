"""Shard the frozen base model's layers over the ranks.

Each rank keeps a shard of every decoder layer and gathers the whole layer while it computes.
Embeddings, head and trainable parameters stay whole on every rank: they are small, and the adapter
is then saved and exported as in a single process.

PyTorch's FSDP2 does it where it can (torch.distributed.fsdp.fully_shard: torch 2.6 and
newer, weights that are numbers); `gather` does it elsewhere, `zero` where DeepSpeed is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.fsdp
from torch import nn

from ..config.schema import TrainingSection
from ..errors import UnavailableError
from ..memory_estimate import Parallelism
from . import sizes, zero
from .gather import GatheredLayers, move
from .ranks import Ranks

Sharder = Callable[[nn.ModuleList, nn.Module, set[nn.Parameter]], None]


def choose_sharder(
    parallelism: Parallelism,
    training: TrainingSection,
    device: str,
    ranks: Ranks,
    *,
    is_packed: bool,
) -> Sharder:
    """Return how layers are shared out here; all ranks must ask at the same time."""
    if parallelism == "deepspeed":
        is_offloaded = training.offload_param_device == "cpu"
        return lambda layers, decoder, _: zero.shard_layers(
            layers, decoder, device, ranks, is_offloaded=is_offloaded
        )
    fully_shard = getattr(torch.distributed.fsdp, "fully_shard", None)

    def gather(layers: nn.ModuleList, *_: Any) -> None:
        GatheredLayers(layers, device, ranks)

    if fully_shard is None or is_packed:
        return gather

    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (ranks.count,))

    def sharder(layers: nn.ModuleList, decoder: nn.Module, whole: set[nn.Parameter]) -> None:
        for module in (*layers, decoder):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)

    return sharder


def shard(model: Any, decoder: nn.Module, device: str, sharder: Sharder) -> None:
    """Share out the decoder's layers, and move what is left whole to the device.

    Raises:
        UnavailableError: the decoder's layers were not found, or are left out at random.
    """
    layers = _layers_of(model, decoder)
    if getattr(model.config, "layerdrop", 0):
        raise UnavailableError.of(
            f"models of type {model.config.model_type} with layerdrop cannot be sharded",
            where="training.parallelism",
            why="each process would skip different layers and wait forever for the others",
            remedy="--parallelism ddp, and nothing offloaded",
        )
    own = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
    whole = {p for p in model.parameters() if p not in own}
    sharder(layers, decoder, whole)
    for parameter in whole:
        move(parameter, device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _layers_of(model: Any, decoder: nn.Module) -> nn.ModuleList:
    count = sizes.layers(model.config)
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnavailableError.of(
        f"models of type {model.config.model_type} cannot be sharded",
        where="training.parallelism",
        why=f"it has no list of {count} layers",
        remedy="--parallelism ddp, and nothing offloaded",
    )
