"""Prove on the loaded model that what we compute is what the model computes.

Two shortcuts are taken that a model could break silently: the decoder and the head are
called apart, and examples are concatenated. Both are compared, on a few random tokens,
with the model's own forward pass on each example alone. A head that differs is refused
by name; packing that differs falls back to padding. A base model in 4 or 8 bits is
compared with itself, in the same bits: rounding explains no more there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UnavailableError
from .attention import UnsupportedAttentionError, switch
from .forward import CausalLM, MicroBatch
from .quantize import rows_apart

# Largest difference of a mean token loss that rounding explains: float32 and bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
LENGTHS = (9, 24, 5)
# A sliding window shorter than this is crossed by the probe; a longer one costs too much.
LONGEST_WINDOW = 512


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean token loss of our path less the model's own, on the same tokens."""

    value: float
    tolerance: float

    @property
    def is_small(self) -> bool:
        """Tell whether rounding explains it."""
        return bool(np.isfinite(self.value)) and abs(self.value) <= self.tolerance


def verify(causal: CausalLM, is_any: Callable[[bool], bool] = bool) -> str:
    """Check head and packing; switch `causal` to padding where packing is not exact.

    Several ranks decide together: `is_any` tells whether any of them says so. Returns a
    sentence for the plan when padding is used instead, else an empty string.

    Raises:
        UnavailableError: the model does something to its logits that we do not do.
    """
    was_training = causal.model.training
    causal.model.eval()
    try:
        with rows_apart(causal.inner):
            return _verify(causal, is_any)
    finally:
        causal.model.train(was_training)


def _verify(causal: CausalLM, is_any: Callable[[bool], bool]) -> str:
    batch = _sample(causal.inner)
    if causal.packed is not None:
        try:
            packed = _difference(causal, batch)
        except UnsupportedAttentionError as error:
            reason = f"padding is used: this architecture needs {error}"
        else:
            if not is_any(not packed.is_small):
                return ""
            reason = f"padding is used: concatenated examples differ by {packed.value:.1e}"
        causal.pad()
    else:
        reason = ""
    padded = _difference(causal, batch)
    if not padded.is_small:
        kind = causal.inner.config.model_type
        raise UnavailableError.of(
            f"models of type {kind} are not supported",
            where="model_name_or_path",
            why=f"the model's own loss and ours differ by {padded.value:.1e} on the same tokens: "
            "its head does something unknown to us",
            remedy="choose another base model, or report this type",
        )
    return reason


def exercise(causal: CausalLM) -> None:
    """Run the model forward and backward once, on the examples that `verify` uses."""
    try:
        causal.loss(_sample(causal.inner)).backward()
    finally:
        causal.model.zero_grad(set_to_none=True)


def _sample(model: Any) -> MicroBatch:
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    config = text or model.config
    window = getattr(config, "sliding_window", None) or 0
    extra = (window + 7,) if 0 < window <= LONGEST_WINDOW else ()
    order = np.random.Generator(np.random.PCG64(0))
    ids = [order.integers(0, config.vocab_size, length) for length in (*LENGTHS, *extra)]
    return MicroBatch(ids, [np.ones(len(one), dtype=bool) for one in ids])


@torch.no_grad()
def _difference(causal: CausalLM, batch: MicroBatch) -> Difference:
    tolerance = TOLERANCES[causal.precision]
    ours = causal.score(batch)[0] / batch.targets
    return Difference(ours - _own_loss(causal, batch), tolerance)


def _own_loss(causal: CausalLM, batch: MicroBatch) -> float:
    """Return the mean token loss of the model's own forward, one example at a time."""
    # Eager attention knows every argument (soft-caps too); sdpa raises or leaves them out.
    before = switch(causal.inner, "eager")
    total = 0.0
    try:
        for ids in batch.ids:
            ids_1T = torch.from_numpy(ids).to(causal.device)[None]
            with causal.autocast():
                logits = causal.model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
            total += float(
                torch.nn.functional.cross_entropy(logits.float(), ids_1T[0, 1:], reduction="sum")
            )
    finally:
        switch(causal.inner, before)
    return total / batch.targets
