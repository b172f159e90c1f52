"""Watch every operation as a GPU would see it, on a machine that has none.

Tensors on the `meta` device stand for those on a GPU: they have shapes and types, and nothing is
computed. `DeviceWatch` sees each operation of the forward pass, the backward pass and the
optimizer, refuses one whose tensors are on two devices, and keeps what would make the host wait
for the GPU. What the host reads is answered with a plausible value, so that the program goes on.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# They launch nothing: their memory is that of their argument, or is not written yet.
IDLE = {"_unsafe_view", "_reshape_alias", "alias", "lift_fresh", "empty", "empty_like", "new_empty"}
IDLE |= {"empty_strided", "new_empty_strided"}
# Their results' sizes are those that the GPU finds: the host waits for it.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


@contextlib.contextmanager
def meta_as_gpu() -> Iterator[DeviceWatch]:
    """Watch what runs on the meta device; torch 2.1 knows no autocast there, not even off."""
    watch = DeviceWatch()
    autocast, tensor = torch.autocast, torch.tensor

    def no_autocast(device_type: str, *others: Any, **named: Any) -> Any:
        if device_type == "meta":
            return contextlib.nullcontext()
        return autocast(device_type, *others, **named)

    def copied(data: Any, **named: Any) -> torch.Tensor:
        """Make a tensor of numbers, which no operation shows: they go to the GPU by a copy."""
        if torch.device(named.get("device") or "cpu").type == "meta":
            watch.uploads += 1
            watch.waits["tensor to GPU"] += 1
        return tensor(data, **named)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", no_autocast))
        stack.enter_context(mock.patch.object(torch, "tensor", copied))
        if not hasattr(torch, "meta"):  # torch 2.1's checkpointing looks for its generators there
            stack.enter_context(mock.patch.object(torch, "meta", SimpleNamespace(), create=True))
        yield stack.enter_context(watch)


class TwoDevicesError(AssertionError):
    """An operation was given tensors of the host and of the GPU."""


class DeviceWatch(TorchDispatchMode):
    """Count operations, changes of type, uploads, and what makes the host wait for `gpu`."""

    def __init__(self, gpu: str = "meta") -> None:
        super().__init__()
        self.gpu = gpu
        self.operations: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        given = list(_tensors((args, named)))
        name = func._schema.name.removeprefix("aten::")
        on_gpu = [one for one in given if one.device.type == self.gpu]
        if func in COPIES:
            return self._copy(func, args, named)
        if name == "_local_scalar_dense" and on_gpu and self.gpu == "meta":
            self.waits[name] += 1
            return _plausible(args[0])
        if name == "nonzero" and on_gpu and self.gpu == "meta":
            self.waits[name] += 1
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if on_gpu:
            apart = [one for one in given if one.device.type != self.gpu and one.ndim]
            if apart:
                raise TwoDevicesError(f"{func}: {[(str(o.device), tuple(o.shape)) for o in given]}")
            if name in WAITING:
                self.waits[name] += 1
        result = func(*args, **named)
        if (on_gpu or _is_on(result, self.gpu)) and not is_view(func) and name not in IDLE:
            self.operations[name] += 1
        return result

    def _copy(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Copy as `func` does; a copy from the GPU is answered where there is none."""
        source = args[1] if func is aten.copy_.default else args[0]
        if func is aten.copy_.default:
            device, dtype = args[0].device, args[0].dtype
            is_waiting = not (len(args) > 2 and args[2]) and not named.get("non_blocking")
        else:
            device = torch.device(named.get("device") or source.device)
            dtype = named.get("dtype") or source.dtype
            is_waiting = not named.get("non_blocking")
        name = func._schema.name.removeprefix("aten::")
        before, after = source.device.type == self.gpu, device.type == self.gpu
        if before and not after:
            self.waits[f"{name} to host"] += 1
            if self.gpu == "meta":
                ones = torch.ones(source.shape, dtype=dtype, device=device)
                return args[0].copy_(ones) if func is aten.copy_.default else ones
        elif after and not before and source.ndim:
            self.uploads += 1
            if is_waiting:
                self.waits[f"{name} to GPU"] += 1
        elif after:
            self.operations[name] += 1
            if dtype != source.dtype:
                self.casts[f"{source.dtype} to {dtype}".replace("torch.", "")] += 1
        return func(*args, **named)


def is_view(func: Any) -> bool:
    """Return whether an operation returns its argument's memory without writing to it."""
    aliases = [one.alias_info for one in func._schema.returns]
    return any(one is not None and not one.is_write for one in aliases)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for one in values:
            yield from _tensors(one)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _is_on(result: Any, device: str) -> bool:
    return any(one.device.type == device for one in _tensors(result))


def _plausible(tensor: torch.Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1
