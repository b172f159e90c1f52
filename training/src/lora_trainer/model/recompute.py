"""Inputs of adapted projections that are computed again in the backward pass instead of kept.

A projection needs its input for the gradient of its adapter. Where the input is a norm or a gated
activation, what that was computed from is kept anyway, by a layer's other operations: `computed_by`
notes it, and `fused.py` computes the input again, and its gradient with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NOTE = "_lora_trainer_computed_by"


@dataclass(frozen=True, slots=True)
class Formula:
    """How a tensor is computed, from `inputs` tensors with gradients and others without.

    `again` takes all of them; it returns the tensor, and what `gradients` can use of its work.
    `gradients` takes the gradient of the tensor, that work, and all of them; it returns the
    gradients of the inputs, and may change both of the former.
    """

    inputs: int
    again: Callable[..., tuple[Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """A projection's input, and the tensors from which it can be computed again.

    Without a formula that is the input itself. `version` counts changes in place.
    """

    value: Tensor
    tensors: tuple[Tensor, ...]
    formula: Formula | None = None
    version: int = 0

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Return the tensors that gradients go to."""
        return self.tensors[: self.formula.inputs] if self.formula else self.tensors


def computed_by(formula: Formula, output: Tensor, *tensors: Tensor) -> Tensor:
    """Note how `output` was computed, and return it."""
    if output.requires_grad:
        setattr(output, NOTE, Source(output.detach(), tensors, formula, output._version))
    return output


def source_of(x: Tensor, dtype: torch.dtype) -> Source:
    """Return how an input of products in `dtype` is computed again; itself, if it was changed."""
    note: Any = getattr(x, NOTE, None)
    is_same = note is not None and x.dtype == dtype and x._version == note.version
    return note if is_same else Source(x, (x,))
