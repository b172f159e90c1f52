"""Share the frozen base model's layers out over the ranks, with PyTorch's FSDP2.

Each rank keeps a part of every decoder layer and gathers the whole layer while it
computes. Embeddings, head and all that is trained stay whole on every rank: these are a
small part, and the adapter is then saved and exported as one process does it.
Source: torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnavailableError


def check_sharding() -> None:
    """Refuse a PyTorch without `fully_shard` that leaves parameters out.

    Raises:
        UnavailableError: it is too old.
    """
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        raise UnavailableError.of(
            "parallelism: fsdp needs a newer PyTorch",
            where="parallelism",
            why=f"torch {torch.__version__} has no torch.distributed.fsdp.fully_shard",
            remedy="use the current stack, or --parallelism ddp with --use_4bit true",
        ) from None


def make_mesh(device: str, count: int) -> Any:
    """Return the mesh of all ranks, who must make it at the same time."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (count,))


def shard(model: Any, decoder: nn.Module, device: str, mesh: Any) -> None:
    """Share out the decoder's layers, and move what is left whole to the device.

    Raises:
        UnavailableError: the decoder's layers were not found.
    """
    from torch.distributed.fsdp import fully_shard

    layers = _layers_of(model, decoder)
    own = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
    whole = {p for p in model.parameters() if p not in own}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    with torch.no_grad():
        for parameter in whole:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _layers_of(model: Any, decoder: nn.Module) -> nn.ModuleList:
    count = model.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnavailableError.of(
        f"models of type {model.config.model_type} cannot be sharded",
        where="parallelism: fsdp",
        why=f"no list of {count} layers was found in it",
        remedy="--parallelism ddp",
    )
