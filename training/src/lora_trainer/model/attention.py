"""Attention over concatenated examples: each example sees only itself, no padding exists.

The examples of a micro-batch are concatenated into a single row of T tokens; positions restart at
each example. `PackedAttention` is registered with transformers under its own name and runs scaled
dot-product attention a segment at a time, so the work is the sum of the squares of the lengths, not
the square of the sum; or a kernel for variable lengths, where there is one, on all segments at
once.

Legend: B batch (1 here), H heads, T tokens, D head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's usual name
from torch import Tensor, nn

from ..data.prefixes import Segment
from . import sinks
from .flash import VariableLength
from .tree_attention import attend_tree

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "lora_trainer_packed"
FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
HAS_GROUPS = "enable_gqa" in str(F.scaled_dot_product_attention.__doc__)  # not in torch 2.1


class UnsupportedAttentionError(Exception):
    """A model uses an attention feature that packing does not support; the text names it."""


class PackedAttention:
    """The attention function of a model whose micro-batch is packed.

    `lengths` are the current examples' lengths in tokens. They stay set until the next
    micro-batch, so that gradient checkpointing's second forward sees the same ones. Where examples
    share their beginnings, `segments` say which tokens continue which (`data/prefixes.py`).
    """

    def __init__(self, kernel: VariableLength | None = None) -> None:
        self.lengths: Sequence[int] = ()
        self.segments: Sequence[Segment] = ()
        self.kernel = kernel
        self.has_sinks = False  # seen in a call

    @contextlib.contextmanager
    def alone(self, length: int) -> Iterator[None]:
        """Attend to the tokens of one example for a while, for a module that is given no others."""
        before, self.lengths = self.lengths, (length,)
        try:
            yield
        finally:
            self.lengths = before

    def __call__(
        self,
        module: nn.Module,
        query_BHTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend inside each example. `s_aux` are the heads' attention sinks.

        Shapes: query, key, value (1, heads, T, D); returns (1, T, heads, D).

        Raises:
            UnsupportedAttentionError: a position bias, sinks and a soft cap, or what a shared
                prefix is not computed with are asked for.
        """
        del attention_mask
        if others.get("position_bias") is not None:
            raise UnsupportedAttentionError("attention argument position_bias")
        if s_aux is not None and softcap is not None:
            raise UnsupportedAttentionError("attention argument s_aux with softcap")
        lengths, window = _spans(module, self.lengths), sliding_window
        if window is not None and max(lengths) <= window:
            window = None
        self.has_sinks |= s_aux is not None
        is_covered = self.kernel is not None and self.kernel.takes(window, softcap)
        if self.kernel is not None and is_covered and not dropout and s_aux is None:
            query_THD, key_THD, value_THD = (
                part.squeeze(0).transpose(0, 1) for part in (query_BHTD, key_BHTD, value_BHTD)
            )
            made_THD: Tensor = self.kernel(
                query_THD, key_THD, value_THD, lengths,
                scaling=scaling, window=window, softcap=softcap,
            )  # fmt: skip
            return made_THD[None], None
        groups = query_BHTD.shape[1] // key_BHTD.shape[1]
        is_grouped = groups > 1 and softcap is None and window is None
        if groups > 1 and not (is_grouped and _shares_heads(query_BHTD, key_BHTD, dropout)):
            key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
            value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
        if self.segments:
            if s_aux is not None or dropout or len(lengths) > len(self.lengths):
                raise UnsupportedAttentionError("sinks, dropout or chunks after a shared prefix")
            return self._attend_tree(
                query_BHTD, key_BHTD, value_BHTD, scaling, window, softcap
            ), None
        examples = zip(
            query_BHTD.split(list(lengths), dim=2),
            key_BHTD.split(list(lengths), dim=2),
            value_BHTD.split(list(lengths), dim=2),
            strict=True,
        )
        done = [_attend(q, k, v, scaling, dropout, window, softcap, s_aux) for q, k, v in examples]
        return torch.cat([one.transpose(1, 2) for one in done], dim=1), None

    def _attend_tree(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend in each segment, and from there to the segments that it continues."""
        is_plain = softcap is None and window is None and query.dtype == key.dtype == value.dtype
        if is_plain and _has_cpu_kernel(query, key, value):
            return attend_tree(query, key, value, self.segments, scaling)
        done = []
        for one in self.segments:
            seen = [s for s in self.segments if s.stop <= one.start < s.end]
            keys, values = (
                torch.cat([t[:, :, s.start : s.stop] for s in (*seen, one)], dim=2)
                for t in (key, value)
            )
            own = query[:, :, one.start : one.stop]
            done.append(_attend(own, keys, values, scaling, 0.0, window, softcap, None))
        return torch.cat([one.transpose(1, 2) for one in done], dim=1)


def _spans(module: Any, lengths: Sequence[int]) -> Sequence[int]:
    """Return the lengths of what attends to itself alone: examples, or their chunks in Llama 4."""
    config = getattr(module, "config", None)
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not chunk or not kinds or kinds[module.layer_idx] != "chunked_attention":
        return lengths
    return [min(chunk, n - start) for n in lengths for start in range(0, n, chunk)]


def _shares_heads(query_BHTD: Tensor, key_BHTD: Tensor, dropout: float) -> bool:
    """Return whether the kernel that PyTorch picks takes fewer key heads than query heads.

    Flash attention does, on a GPU and on a CPU; where PyTorch picks another kernel, grouped heads
    would make it compute all scores.
    """
    if not HAS_GROUPS or query_BHTD.device.type not in ("cpu", "cuda"):
        return False
    if query_BHTD.device.type == "cpu":
        number = torch._fused_sdp_choice(
            query_BHTD, key_BHTD, key_BHTD, None, dropout, True, enable_gqa=True
        )
    else:
        number = torch._fused_sdp_choice(query_BHTD, query_BHTD, query_BHTD, None, dropout, True)
    return int(number) == FLASH


def _has_cpu_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether PyTorch's attention runs in its flash kernel on a CPU."""
    if query.device.type != "cpu":
        return False
    groups: Any = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return int(torch._fused_sdp_choice(query, key, value, None, 0.0, True, **groups)) == FLASH


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Attend causally; keys that are more than the queries come before the first query."""
    tokens, seen = query.shape[2], key.shape[2]
    groups: Any = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    is_whole = tokens == seen and (window is None or tokens <= window)
    if sink is not None:
        is_seen = None if is_whole else _causal_window(tokens, seen, window, query.device)
        return sinks.attend(query, key, value, sink, scaling, dropout, is_seen)
    if softcap is None and is_whole:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, **groups
        )
    is_seen = _causal_window(tokens, seen, window, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=is_seen, dropout_p=dropout, scale=scaling, **groups
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    scores = scores.masked_fill(~is_seen, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout, training=dropout > 0) @ value


def _causal_window(tokens: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of the `seen` keys each of the last `tokens` sees: itself and those before it.

    With a window itself and `window - 1` of them.
    """
    index = torch.arange(seen, device=device)
    distance = index[seen - tokens :, None] - index[None, :]
    is_seen = distance >= 0
    return is_seen if window is None else is_seen & (distance < window)


def install(model: nn.Module, kernel: VariableLength | None = None) -> PackedAttention:
    """Register a `PackedAttention` with transformers and switch `model` to it.

    It takes no mask. transformers 5 builds none for a name that is only in the registry of
    attention functions, and does not search the positions for example boundaries, which would
    synchronize host and device. 4.50 would build T x (T + 1) numbers in every forward pass. In
    both, a few classes look for padding tokens if they get no mask.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = PackedAttention(kernel)
    _register(ALL_ATTENTION_FUNCTIONS, attention)
    names = ("_update_causal_mask", "warn_if_padding_and_no_attention_mask")
    for module in model.modules():
        for name in names:
            if hasattr(module, name):
                own: Any = getattr(module, name)
                setattr(module, name, _unless_packed(module.config, own))
    switch(model, NAME)
    return attention


def switch(model: nn.Module, implementation: str) -> str:
    """Make `model` use an attention implementation; return the one it used before."""
    config: PretrainedConfig = model.config
    before = str(config._attn_implementation)
    config._attn_implementation = implementation
    return before


def _register(registry: Any, function: object) -> None:
    # 5.x checks names against the class-wide mapping, 4.50 has a plain dict.
    if hasattr(registry, "register"):
        registry.register(NAME, function)
    else:
        registry[NAME] = function


def _unless_packed(config: PretrainedConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a model for any attention but ours, under which it returns None."""

    def call(*arguments: Any, **named: Any) -> Any:
        return None if config._attn_implementation == NAME else function(*arguments, **named)

    return call
