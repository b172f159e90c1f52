"""Gated activations by one autograd function that keeps what its two projections gave, alone.

    h = act(gate) up

transformers computes two operations, for which autograd keeps gate, act(gate) and up. Here the
activation is computed again in the backward pass, and so is h, which the projection that reads it
would keep (`recompute.py`).

A module's own `forward` is exchanged where it computes `down(act(gate(x)) up(x))` with one of the
activations below: that is seen by giving a copy of it small projections of random numbers, so
neither the model's weights nor their precision or place matter.

Legend: I width of the activation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's usual name
from torch import Tensor, nn

from .exchange import exchange, is_own
from .recompute import Formula, computed_by

aten = torch.ops.aten
# The projections of a gated activation, and of one whose gate and up are one projection.
TRIPLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
JOINT = ("gate_up_proj", "down_proj")
TOLERANCE = 1e-12  # of float64
COMPARED_WIDTH, COMPARED_TOKENS = 3, 64


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation, and its gradient from that of its output and its input."""

    function: Callable[[Tensor], Tensor]
    gradient: Callable[..., Tensor]

    def again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return act(gate) up, and act(gate)."""
        activated = self.function(gate)
        return activated * up, activated

    def gradients(
        self, above: Tensor, activated: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of gate and up; what was computed for them is used up."""
        return self.gradient(above * up, gate), activated.mul_(above)

    @property
    def formula(self) -> Formula:
        """Return how a projection computes the activation again."""
        return Formula(2, self.again, self.gradients)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda above, x: aten.gelu_backward(above, x, approximate=approximate),
    )


ACTIVATIONS = {
    "silu": Activation(F.silu, aten.silu_backward),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


class _Gated(torch.autograd.Function):
    """act(gate) up, and its gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.function(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        activated = ctx.activation.function(gate)
        return *ctx.activation.gradients(gradients[0], activated, gate, up), None


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return act(gate) up (..., I)."""
    if gate.dtype != up.dtype:
        return activation.function(gate) * up
    output: Tensor = _Gated.apply(gate, up, activation)
    return computed_by(activation.formula, output, gate, up)


def install(model: nn.Module) -> int:
    """Exchange what every covered gated activation computes; return how many there are."""
    count = 0
    known: dict[Any, Activation | None] = {}
    for module in model.modules():
        names = _names(module)
        if names is None or not is_own(module):
            continue
        kind = _kind(module)
        if kind not in known:
            known[kind] = _activation(module, names)
        activation = known[kind]
        if activation is not None:
            exchange(module, _forward_of(module, names, activation))
            count += 1
    return count


def _names(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a module's projections, where it has those of a gated activation."""
    children = {name for name, child in module.named_children() if child is not None}
    return next((names for names in (*TRIPLES, JOINT) if children.issuperset(names)), None)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Return what may decide what a module computes besides its weights."""
    values = sorted(
        (name, repr(value))
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name != "training"
    )
    functions = [repr(v) for v in (*vars(module).values(), *module.children()) if _is_simple(v)]
    return type(module), *values, *functions


def _is_simple(value: object) -> bool:
    if isinstance(value, nn.Module):
        return not any(True for _ in value.parameters())
    return callable(value)


@torch.no_grad()
def _activation(module: nn.Module, names: tuple[str, ...]) -> Activation | None:
    """Return the activation with which a module computes what ours does; None where none does."""
    stand_in = copy.copy(module)
    stand_in.__dict__["_modules"] = dict(module._modules)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        for name, (outputs, inputs) in _shapes(names).items():
            linear = nn.Linear(inputs, outputs, device="cpu", dtype=torch.float64)
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
            stand_in._modules[name] = linear
    x = 2 * torch.randn(1, COMPARED_TOKENS, COMPARED_WIDTH, generator=generator).double()
    try:
        own = stand_in(x)
        for activation in ACTIVATIONS.values():
            ours = _computed(stand_in, names, activation, x)
            if torch.allclose(own, ours, rtol=TOLERANCE, atol=TOLERANCE):
                return activation
    except Exception:  # it takes more than its input, or gives something else
        return None
    return None


def _shapes(names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of the projections that a module is compared with."""
    wide = COMPARED_WIDTH + 2
    *into, out = names
    joint = 2 if len(into) == 1 else 1
    return dict.fromkeys(into, (joint * wide, COMPARED_WIDTH)) | {out: (COMPARED_WIDTH, wide)}


def _computed(module: Any, names: tuple[str, ...], activation: Activation, x: Tensor) -> Tensor:
    """Return what a module computes, by our function."""
    modules = [getattr(module, name) for name in names]
    *into, down = modules
    gate, up = into[0](x).chunk(2, -1) if len(into) == 1 else (one(x) for one in into)
    output: Tensor = down(gated(gate, up, activation))
    return output


def _forward_of(
    module: nn.Module, names: tuple[str, ...], activation: Activation
) -> Callable[..., Tensor]:
    own: Callable[..., Tensor] = module.forward

    def forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:
            return own(x, *others, **named)
        return _computed(module, names, activation, x)

    return forward
