"""The language-model head and its loss, computed only at supervised positions.

Hidden states of supervised positions go through the head in chunks; each chunk's
gradient is computed with its loss, so the logits of more than one chunk never exist.

Legend: N supervised positions, W hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """A model's output layer with what the model does to its logits.

    logits = softcap(linear(hidden) * multiplier), softcap(z) = cap * tanh(z / cap).
    Source: Gemma 2 (arXiv:2408.00118) for the cap, Cohere's and Granite's model code for
    the multiplier.
    """

    linear: nn.Module
    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden_NW: Tensor) -> Tensor:
        """Return logits_NV of hidden states, in float32 at least."""
        logits_NV = _widened(self.linear(hidden_NW))
        if self.multiplier != 1.0:
            logits_NV = logits_NV * self.multiplier
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the head's own parameters that are trained (modules_to_save, LoRA on it)."""
        return [p for p in self.linear.parameters() if p.requires_grad]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Gemma 2 and 3's field, RecurrentGemma's, xLSTM's.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def find_head(model: Any) -> Head:
    """Return the head of a causal language model from its config's field names.

    Whether that is all the model does is not taken on trust: `probe.verify` compares.
    """
    config = model.config
    multiplier = float(getattr(config, "logit_scale", None) or 1.0)
    if scaling := getattr(config, "logits_scaling", None):
        multiplier /= float(scaling)
    cap = next((own for name in SOFTCAPS if (own := getattr(config, name, None))), None)
    return Head(model.get_output_embeddings(), multiplier, float(cap) if cap else None)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross entropies over N positions; gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NW: Tensor,
        labels_N: Tensor,
        head: Head,
        chunk: int,
        factor: float,
        *parameters: Tensor,
    ) -> Tensor:
        total = _widened(torch.zeros((), dtype=hidden_NW.dtype, device=hidden_NW.device))
        has_gradient = hidden_NW.requires_grad or any(p.requires_grad for p in parameters)
        hidden_gradient = torch.empty_like(hidden_NW) if has_gradient else None
        sums = [_widened(torch.zeros_like(p)) for p in parameters]
        for start in range(0, len(labels_N), chunk):
            part = hidden_NW[start : start + chunk].detach()
            labels = labels_N[start : start + chunk]
            with torch.set_grad_enabled(has_gradient):
                logits = head(part.requires_grad_(has_gradient))
            loss, into_logits = _loss_and_gradient(logits.detach(), labels, factor)
            total += loss
            if hidden_gradient is not None:
                gradients = torch.autograd.grad(logits, [part, *parameters], into_logits)
                hidden_gradient[start : start + chunk] = gradients[0]
                for index, gradient in enumerate(gradients[1:]):
                    sums[index] += gradient
            del logits, into_logits  # before the next chunk's are made
        ctx.save_for_backward(hidden_gradient, *sums)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        hidden_gradient, *sums = ctx.saved_tensors
        return hidden_gradient * scale, None, None, None, None, *(s * scale for s in sums)


def _loss_and_gradient(logits_NV: Tensor, labels_N: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return `factor` times the summed cross entropy and its gradient; overwrites the logits.

    The kernels are those of `F.cross_entropy`, so every bit is the same; autograd would have four
    tensors of the logits' size in memory, this has two. No head keeps its logits for the backward
    pass, and each of the kernels reads an element before it writes that element.
    """
    log_p_NV = torch.log_softmax(logits_NV, 1, out=logits_NV)
    loss = F.nll_loss(log_p_NV, labels_N, reduction="sum") * factor
    gradient_NV = torch.zeros_like(log_p_NV).scatter_(1, labels_N[:, None], -factor)
    if not gradient_NV.is_meta:  # where it would change nothing; torch 2.1 does not have it there
        torch.ops.aten._log_softmax_backward_data.out(
            gradient_NV, log_p_NV, 1, log_p_NV.dtype, out=gradient_NV
        )
    return loss, gradient_NV


def summed_loss(
    head: Head, hidden_NW: Tensor, labels_N: Tensor, chunk: int, factor: float = 1.0
) -> Tensor:
    """Return `factor` times the sum over N positions of -log p(label), with its gradients.

    Gradients are computed here, in the hidden states' precision: in float16 those of the plain
    sum would be rounded to zero before a loss scale outside of it could lift them.

    Shapes: hidden (N, W) already at the positions that predict the labels; labels (N,).
    """
    loss: Tensor = _ChunkedLoss.apply(
        hidden_NW, labels_N, head, chunk, factor, *head.trainable_parameters()
    )
    return loss


@torch.no_grad()
def summed_loss_and_hits(
    head: Head, hidden_NW: Tensor, labels_N: Tensor, chunk: int
) -> tuple[float, int]:
    """Return the summed loss and how many labels are the most likely token; no gradients."""
    figures = torch.zeros(2, dtype=torch.float64, device=hidden_NW.device)
    for start in range(0, len(labels_N), chunk):
        figures += loss_and_hits(
            head(hidden_NW[start : start + chunk]), labels_N[start : start + chunk]
        )
    loss, hits = figures.tolist()  # read once: the host waits for the device each time
    return loss, int(hits)


def loss_and_hits(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the summed cross entropy and how many labels are the most likely token, float64."""
    loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    hits = (logits_NV.argmax(-1) == labels_N).sum()
    return torch.stack([loss.double(), hits.double()])
