"""Modules that compute by a function of ours, and can be given their own `forward` back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

OWN_FORWARD = "_lora_trainer_own"


def is_own(module: nn.Module) -> bool:
    """Tell whether a module computes by the `forward` of its class, as nobody has exchanged it."""
    return "forward" not in vars(module)


def exchange(module: Any, forward: Callable[..., Any]) -> None:
    """Have `forward` compute a module until `remove`."""
    setattr(module, OWN_FORWARD, module.forward)
    module.forward = forward


def remove(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in _exchanged(model):
        del module.forward
        delattr(module, OWN_FORWARD)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let every module compute what it did before for a while, for a comparison."""
    exchanged = [(module, module.forward) for module in _exchanged(model)]
    try:
        for module, _ in exchanged:
            module.forward = getattr(module, OWN_FORWARD)
        yield
    finally:
        for module, ours in exchanged:
            module.forward = ours


def _exchanged(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, OWN_FORWARD)]
