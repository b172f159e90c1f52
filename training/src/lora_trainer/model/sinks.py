"""Attention with sinks: each head has one more score, which takes weight and gives no value.

    weights = softmax([scores, sink]) without its last column

A token before all others stands for the sink: its value is 0, and one more number a head makes its
score the sink and leaves the other scores alone. So PyTorch's kernels compute it, causal and with
gradients, without a matrix of scores.

Legend: H query heads, T tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's usual name
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_H: Tensor,
    scaling: float | None,
    dropout: float,
    is_seen_TT: Tensor | None,
) -> Tensor:
    """Return causal attention of one example, or that of `is_seen_TT`, which has a window.

    Shapes: query (1, H, T, D); key and value may have fewer heads; returns (1, H, T, D of values).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups: Any = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    extra = (sink_H.to(query.dtype) / scale).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
    sink_key = F.pad(torch.zeros_like(key[:, :, :1]), (0, 1), value=1.0)
    output = F.scaled_dot_product_attention(
        F.pad(torch.cat((query, extra), dim=-1), (0, 0, 1, 0)),
        torch.cat((sink_key, F.pad(key, (0, 1))), dim=2),
        F.pad(value, (0, 1, 1, 0)),  # as wide as the keys, which kernels ask for
        attn_mask=None if is_seen_TT is None else F.pad(is_seen_TT, (1, 0, 1, 0), value=True),
        dropout_p=dropout,
        is_causal=is_seen_TT is None,
        scale=scale,
        **groups,
    )
    return output[:, :, 1:, :-1]
