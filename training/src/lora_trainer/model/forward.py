"""A micro-batch through the model: packed or padded in, summed loss out.

Legend: B examples, L longest, T tokens of all examples, W width, N supervised positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import compat
from . import attention as packed_attention
from . import fused
from .attention import PackedAttention
from .flash import VariableLength
from .head import Head, find_head, summed_loss, summed_loss_and_hits


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples that go through the model together: for each, token ids and trained marks."""

    ids: Sequence[NDArray[np.int64]]
    is_trained: Sequence[NDArray[np.bool_]]

    @property
    def tokens(self) -> int:
        """Return the tokens of all examples."""
        return sum(len(ids) for ids in self.ids)

    @property
    def targets(self) -> int:
        """Return the supervised positions: a first token has none before it to predict it."""
        return int(sum(int(marks[1:].sum()) for marks in self.is_trained))


class CausalLM:
    """A causal language model as the loop sees it: a micro-batch in, a summed loss out.

    `model` is the transformers or PEFT model; its decoder and head are called apart, so
    that only supervised positions reach the head. `has_fused_lora` has each projection that
    is covered computed by one function (docs/decisions/0013); no run asks for it yet.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: str,
        padding_free: bool,
        chunk: int,
        precision: str,
        kernel: VariableLength | None = None,
        has_fused_lora: bool = False,
    ) -> None:
        if has_fused_lora:
            fused.install(model)
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inner = inner
        self.decoder = compat.decoder(inner)
        self.head: Head = find_head(inner)
        self.device = device
        self.chunk = chunk
        self.precision = precision
        self.native_attention = str(inner.config._attn_implementation)
        self.is_sharded = False
        self.packed: PackedAttention | None = None
        if padding_free:
            self.packed = packed_attention.install(inner, kernel)

    def loss(self, batch: MicroBatch) -> Tensor:
        """Return the summed cross entropy over the batch's targets, differentiable."""
        with self.autocast():
            hidden_NW, labels_N = self._hidden(batch)
            return summed_loss(self.head, hidden_NW, labels_N, self.chunk)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> tuple[float, int]:
        """Return the summed cross entropy and the number of targets predicted best."""
        with self.autocast():
            hidden_NW, labels_N = self._hidden(batch)
            return summed_loss_and_hits(self.head, hidden_NW, labels_N, self.chunk)

    def shard(self, share: Any) -> None:
        """Share the frozen layers out over the ranks, as `shard.choose_sharing` chose."""
        from .shard import shard

        shard(self.inner, self.decoder, self.device, share)
        self.is_sharded = True

    def pad(self) -> None:
        """Go over to padded micro-batches, for a model that packing would compute wrongly."""
        packed_attention.switch(self.inner, self.native_attention)
        self.packed = None

    @contextlib.contextmanager
    def generating(self) -> Iterator[Any]:
        """Give the model as `generate` wants it: precision, native attention, cache, eval."""
        before = packed_attention.switch(self.inner, self.native_attention)
        was_training = self.model.training
        self.model.eval()
        self.inner.config.use_cache = True
        try:
            with self.autocast():
                yield self.model
        finally:
            self.inner.config.use_cache = False
            self.model.train(was_training)
            packed_attention.switch(self.inner, before)

    def autocast(self) -> Any:
        """Give the precision that the model computes in; whatever runs it does so in here.

        A quantized base has norms in float32 before a head in bfloat16: outside, they do not fit.
        """
        if self.precision == "bfloat16":
            return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _hidden(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states that predict the targets (N, W), and the targets (N,)."""
        if self.packed is not None:
            return self._packed_hidden(self.packed, batch)
        return self._padded_hidden(batch)

    def _packed_hidden(self, packed: PackedAttention, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        lengths = [len(ids) for ids in batch.ids]
        packed.lengths = lengths
        ids_T = np.concatenate(batch.ids)
        positions_T = np.concatenate([np.arange(length) for length in lengths])
        is_target_T = np.concatenate(batch.is_trained)
        is_target_T[np.cumsum([0, *lengths[:-1]])] = False
        (target_N,) = np.nonzero(is_target_T)
        output = self.decoder(
            input_ids=self._tensor(ids_T)[None],
            position_ids=self._tensor(positions_T)[None],
            use_cache=False,
        )
        hidden_TW = output.last_hidden_state[0]
        return hidden_TW[self._tensor(target_N - 1)], self._tensor(ids_T[target_N])

    def _padded_hidden(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        longest = max(len(ids) for ids in batch.ids)
        ids_BL = np.zeros((len(batch.ids), longest), dtype=np.int64)
        mask_BL = np.zeros_like(ids_BL)
        is_target_BL = np.zeros(ids_BL.shape, dtype=bool)
        for row, (ids, marks) in enumerate(zip(batch.ids, batch.is_trained, strict=True)):
            ids_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = 1
            is_target_BL[row, 1 : len(ids)] = marks[1:]
        rows_N, columns_N = np.nonzero(is_target_BL)
        output = self.decoder(
            input_ids=self._tensor(ids_BL), attention_mask=self._tensor(mask_BL), use_cache=False
        )
        hidden_BLW = output.last_hidden_state
        hidden_NW = hidden_BLW[self._tensor(rows_N), self._tensor(columns_N - 1)]
        return hidden_NW, self._tensor(ids_BL[rows_N, columns_N])

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(self.device)
