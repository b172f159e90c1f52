"""Shard frozen layers over the ranks, and gather one layer at a time.

FSDP for frozen weights, where `fully_shard` cannot be used: on PyTorch 2.1.2, and for weights that
bitsandbytes packed into bytes. A layer's frozen weights are one contiguous buffer, sharded over the
ranks. They are gathered before the layer computes, forward or backward, and released when the next
layer is gathered. There are no gradients to scatter: the base is frozen.

Autograd keeps views of the weights for the backward pass. They stay valid because a
layer's bytes always come back into the same storage, which is resized and never replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import Ranks

# Every weight begins at a multiple of it, so that its bytes can be read as its type.
ALIGNMENT_BYTES = 16


class GatheredLayers:
    """Layers of which each rank keeps a part, gathered one by one as they compute."""

    def __init__(self, layers: Iterable[nn.Module], device: str, ranks: Ranks) -> None:
        self._whole: _Layer | None = None
        self.layers = [_Layer(layer, device, ranks) for layer in layers]
        for layer, shared in zip(layers, self.layers, strict=True):
            self._follow(layer, shared)

    @property
    def kept_bytes(self) -> int:
        """Return the bytes that this rank keeps of all layers."""
        return sum(layer.part.numel() for layer in self.layers)

    def _follow(self, layer: nn.Module, shared: _Layer) -> None:
        """Have the layer's weights there whenever it computes."""

        def before(*_: Any) -> None:
            self._hold(shared)

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Its gradient is ready once all later layers are done, and this one comes next.
            if hidden.requires_grad:
                hidden.register_hook(before)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def _hold(self, layer: _Layer) -> None:
        if self._whole is layer:
            return
        if self._whole is not None:
            self._whole.let_go()
        layer.gather()
        self._whole = layer


class _Layer:
    """One layer's frozen weights: this rank's part, and the storage that holds all at times."""

    def __init__(self, layer: nn.Module, device: str, ranks: Ranks) -> None:
        self._ranks = ranks
        self._frozen = [p for p in layer.parameters() if not p.requires_grad]
        self._extents: list[tuple[slice, torch.dtype, torch.Size]] = []
        end = 0
        for parameter in self._frozen:
            extent = slice(end, end + parameter.nbytes)
            self._extents.append((extent, parameter.dtype, parameter.shape))
            end = _aligned(extent.stop, ALIGNMENT_BYTES)
        self._bytes = _aligned(end, ALIGNMENT_BYTES * ranks.count)
        whole = torch.zeros(self._bytes, dtype=torch.uint8)
        for parameter, (extent, _, _) in zip(self._frozen, self._extents, strict=True):
            whole[extent] = parameter.data.cpu().contiguous().view(-1).view(torch.uint8)
            _move_scales(parameter, device)
        self.part = whole.chunk(ranks.count)[ranks.rank].to(device, copy=True)
        self._storage = torch.empty(0, dtype=torch.uint8, device=device).untyped_storage()
        self.let_go()

    def gather(self) -> None:
        """Make the weights whole; all ranks must."""
        self._storage.resize_(self._bytes)
        whole = self.part.new_empty(0).set_(self._storage)
        self._ranks.gather(self.part, whole)
        for parameter, (extent, dtype, shape) in zip(self._frozen, self._extents, strict=True):
            _point(parameter, whole[extent].view(dtype).view(shape))

    def let_go(self) -> None:
        """Give the memory back; whoever reads a weight now finds none, not another's bytes."""
        for parameter, (_, dtype, _) in zip(self._frozen, self._extents, strict=True):
            _point(parameter, torch.empty(0, dtype=dtype, device=self.part.device))
        self._storage.resize_(0)


def _aligned(size: int, to: int) -> int:
    return size + -size % to


def move(parameter: Any, device: str) -> None:
    """Move a parameter that stays whole, with what bitsandbytes keeps beside it."""
    _point(parameter, parameter.data.to(device))
    _move_scales(parameter, device)


def _point(parameter: Any, data: Tensor) -> None:
    """Let a parameter be `data`; bitsandbytes' 8-bit ones say it twice until their first use."""
    parameter.data = data
    if getattr(parameter, "CB", None) is not None:
        parameter.CB = data


def _move_scales(parameter: Any, device: str) -> None:
    """Move what bitsandbytes keeps beside a packed weight; it is small, and stays whole."""
    if getattr(parameter, "quant_state", None) is not None:
        parameter.quant_state.to(device)
    if getattr(parameter, "SCB", None) is not None:
        parameter.SCB = parameter.SCB.to(device)
