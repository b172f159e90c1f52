"""A forward and a backward pass of a model, and their results beside those of another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of some tokens, and a gradient to their embeddings."""
    embedded = model.get_input_embeddings()(torch.arange(5, 45).view(2, 20)).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    return logits, torch.autograd.grad(logits.square().mean(), embedded)[0]


def is_equal(ours: tuple[Tensor, ...], own: tuple[Tensor, ...]) -> bool:
    """Tell whether only the order of operations is between two passes in float64."""
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(ours, own, strict=True))
