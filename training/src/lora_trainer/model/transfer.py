"""Copies of host tensors on a device, which the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(host: Tensor, device: str | torch.device) -> Tensor:
    """Return `host` on `device`; onto a GPU from pinned memory, behind the work already queued."""
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
