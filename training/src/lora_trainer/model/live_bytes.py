"""Count the bytes of live tensors while a model runs on the meta device, which computes nothing.

A dispatch mode sees every operation below autograd, forward and backward; a tensor's bytes are
live until the last reference to its storage is gone, autograd's among them. What the meta device
does unlike the real one is put right above autograd: autocast, which casts no meta tensor;
attention, which a kernel computes without its scores; dropout, whose mask is a byte on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# CUDA's caching allocator hands out multiples of 512 bytes; malloc of 16 or whole pages.
BLOCK_BYTES = 512
# What autocast computes in 16 bits. Source: torch/docs/source/amp.rst, for what models call.
NARROW = frozenset(
    {
        F.linear,
        F.conv1d,
        torch.conv1d,
        F.scaled_dot_product_attention,
        torch.einsum,
        *(
            getattr(owner, name)
            for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv")
            for owner in (torch, Tensor)
        ),
        Tensor.__matmul__,
    }
)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make; `peak` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; its inputs are still there when its outputs are made."""
        self.sweep()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            count = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
            self._alive[key] = (StorageWeakRef(storage), count)
            self.now += count
            self.peak = max(self.peak, self.now)

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Leave tensors out that were there before, as parameters are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = (StorageWeakRef(storage), 0)

    def sweep(self) -> None:
        """Forget the storages that are gone."""
        gone = [key for key, (storage, _) in self._alive.items() if storage.expired()]
        for key in gone:
            self.now -= self._alive.pop(key)[1]


class _Autocast(contextlib.ContextDecorator):
    """`torch.autocast` while counting: it switches the casts of `AsOnDevice`."""

    mode: AsOnDevice

    def __init__(
        self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
    ) -> None:
        del device_type, cache_enabled
        self._to = (dtype or torch.bfloat16) if enabled else None
        self._before: list[Any] = []

    def __enter__(self) -> _Autocast:
        self._before.append(self.mode.narrow)
        self.mode.narrow = self._to
        return self

    def __exit__(self, *_: object) -> None:
        self.mode.narrow = self._before.pop()
        if self.mode.narrow is None:
            self.mode.cast_weights.clear()


class AsOnDevice(TorchFunctionMode):
    """Makes the meta device save and allocate what the real one does.

    `attends_whole` tells whether a kernel computes an attention without its scores, given the
    arguments of `scaled_dot_product_attention`.
    """

    def __init__(self, device: str, has_kernel: Callable[[Tensor, bool, float], bool]) -> None:
        super().__init__()
        self.device = device
        self.has_kernel = has_kernel
        self.narrow: torch.dtype | None = None
        self.cast_weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function as autocast and the device would."""
        kwargs = kwargs or {}
        if self.narrow is not None and func in NARROW:
            args, kwargs = tree_map(self._cast, (tuple(args), kwargs))
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is F.dropout and self.device == "cuda":
            return _cuda_dropout(*args, **kwargs)
        if func is Tensor.__bool__ and args[0].device.type == "meta":
            return False  # whether a mask can be left out: it cannot
        return func(*args, **kwargs)

    def _cast(self, value: object) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dtype in (self.narrow, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.narrow)
        # Autocast keeps the casts of trained weights until it ends.
        if id(value) not in self.cast_weights:
            self.cast_weights[id(value)] = (value, value.to(self.narrow))
        return self.cast_weights[id(value)][1]

    def _attend(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        names = ("attn_mask", "dropout_p", "is_causal")
        named |= dict(zip(names, others, strict=False))
        if not self.has_kernel(
            query, named.get("attn_mask") is not None, named.get("dropout_p", 0)
        ):
            return func(query, key, value, **named)
        return attend(query, key, value, self.device, named.get("attn_mask"))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Take the place of autocast, and let checkpointing work on the meta device."""
        autocast = type("autocast", (_Autocast,), {"mode": self})

        def is_enabled(device_type: str = "cuda") -> bool:
            return self.narrow is not None and device_type in (self.device, "meta")

        with (
            mock.patch.object(torch, "autocast", autocast),
            mock.patch.object(torch, "is_autocast_enabled", is_enabled),
            mock.patch.object(torch.utils.checkpoint, "_infer_device_type", lambda *_: "cpu"),
            self,
        ):
            yield

    def resume_autocast(self) -> tuple[Any, Any]:
        """Return checkpointing's contexts: what is recomputed goes through this mode again."""
        narrow = self.narrow

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            # Autograd's engine calls back with no function mode, and outside autocast.
            with mock.patch.object(self, "narrow", narrow), self:
                yield

        return contextlib.nullcontext(), again()


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps: query, key, value, output, mask, a float32 for each row of scores.

    Source: aten's derivatives of _scaled_dot_product_flash_attention; flash-attn's are alike.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, device: str, mask: Tensor | None
    ) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # aten makes a boolean mask one of numbers to add, in every layer again.
        bias = mask.to(query.dtype) if mask is not None else None
        ctx.save_for_backward(query, key, value, output, sums, bias)
        ctx.device = device
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        del outputs  # the gradients made here are of the inputs' shapes
        query, key, value, _, sums, _ = ctx.saved_tensors
        # On a GPU the queries' gradient is added up in float32.
        scratch = (
            [torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)]
            if ctx.device == "cuda"
            else []
        )
        gradients = tuple(torch.empty_like(one) for one in (query, key, value))
        del scratch
        return *gradients, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, device: str, mask: Tensor | None = None
) -> Tensor:
    """Return attention as a fused kernel leaves it, for tensors of any layout."""
    output: Tensor = _Attention.apply(query, key, value, device, mask)
    return output


def _cuda_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    del inplace
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x
