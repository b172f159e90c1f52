"""The forward pass of a micro-batch: packed or padded examples in, summed loss out.

Five ways, the fastest first: examples concatenated, through decoder and head; the same, with mixers
one example at a time (`mixers.py`); padded, through decoder and head; padded, through the model's
own forward pass, which makes the logits of every position; the same, one example at a time.
`probe.verify` selects the first one that is equal to the model's own forward pass.

Legend: B examples, L longest, T tokens of all examples, W width, N supervised positions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from ..data import prefixes
from ..errors import UnavailableError
from ..memory_estimate import Precision
from . import attention as packed_attention
from . import compat, exchange, fused, gated, mixers, norms, rotary
from .attention import PackedAttention
from .flash import VariableLength, switch_cudnn_off
from .head import Head, find_head, loss_and_hits, summed_loss, summed_loss_and_hits
from .precision import dtype_of
from .transfer import send


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples that go through the model together: for each, token ids and trained marks."""

    ids: Sequence[NDArray[np.int64]]
    loss_mask: Sequence[NDArray[np.bool_]]

    @property
    def tokens(self) -> int:
        """Return the tokens of all examples."""
        return sum(len(ids) for ids in self.ids)

    @property
    def targets(self) -> int:
        """Return the supervised positions: a first token has none before it to predict it."""
        return int(sum(int(loss_mask[1:].sum()) for loss_mask in self.loss_mask))


class CausalLM:
    """A causal language model as the loop sees it: a micro-batch in, a summed loss out.

    `model` is the transformers or PEFT model; its decoder and head are called apart, so
    that only supervised positions reach the head. Layers are fused where they can be (`fused.py`,
    `norms.py`, `rotary.py`, `gated.py`).
    """

    def __init__(
        self,
        model: Any,
        *,
        device: str,
        padding_free: bool,
        chunk: int,
        precision: Precision,
        kernel: VariableLength | None = None,
    ) -> None:
        switch_cudnn_off()
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.inner = inner
        self.is_one_by_one = False  # examples are not padded either
        self.whole_why = ""  # why decoder and head are not called apart; empty: they are
        self._find_decoder_and_head(inner)
        self.device = device
        self.chunk = chunk
        self.precision = precision
        self.dtype = dtype_of(precision)
        fused.install(model, self.dtype)
        self.fused_layers = {
            "norms": norms.install(model),
            "rotary embeddings": rotary.install(model),
            "gated activations": gated.install(model),
        }
        self.native_attention = str(inner.config._attn_implementation)
        self.is_sharded = False
        self.shares_prefixes = False  # switched on where data and model allow it
        self.packed: PackedAttention | None = None
        self.kinds_apart: frozenset[str] = frozenset()  # classes that run one example at a time
        self._apart = contextlib.ExitStack()
        if padding_free and not self.whole_why:
            self.packed = packed_attention.install(inner, kernel)

    def _find_decoder_and_head(self, inner: Any) -> None:
        self.decoder: Any = None
        self.head: Head = NO_HEAD
        try:
            decoder, head = compat.decoder(inner), find_head(inner)
        except Exception as error:  # classes raise what they like where they have no such thing
            self.whole_why = f"its decoder and head were not found ({type(error).__name__})"
            return
        if decoder is None or decoder is inner or head.linear is None:
            self.whole_why = "its decoder and head were not found"
            return
        self.decoder, self.head = decoder, head

    def loss(self, batch: MicroBatch, factor: float = 1.0) -> Tensor:
        """Return `factor` times the summed cross entropy over the targets, differentiable."""
        with self.autocast():
            if self.whole_why:
                logits_NV, labels_N = self._whole_logits(batch)
                return F.cross_entropy(logits_NV, labels_N, reduction="sum") * factor
            hidden_NW, labels_N = self._hidden(batch)
            return summed_loss(self.head, hidden_NW, labels_N, self.chunk, factor)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> tuple[float, int]:
        """Return the summed cross entropy and the number of targets predicted best."""
        with self.autocast():
            if self.whole_why:
                logits_NV, labels_N = self._whole_logits(batch)
                loss, hits = loss_and_hits(logits_NV, labels_N).tolist()
                return loss, int(hits)
            hidden_NW, labels_N = self._hidden(batch)
            return summed_loss_and_hits(self.head, hidden_NW, labels_N, self.chunk)

    def shard(self, sharder: Any) -> None:
        """Share the frozen layers out over the ranks, as `shard.choose_sharder` chose."""
        from .shard import shard

        if self.whole_why:
            kind = self.inner.config.model_type
            raise UnavailableError.of(
                f"models of type {kind} cannot be sharded",
                where="training.parallelism",
                why=self.whole_why,
                remedy="--parallelism ddp, and nothing offloaded",
            )
        shard(self.inner, self.decoder, self.device, sharder)
        self.is_sharded = True

    def leave_layers_alone(self) -> None:
        """Let PEFT compute every adapted projection, and transformers everything else."""
        with self._nothing_apart():
            fused.remove(self.model)
            exchange.remove(self.model)
        self.fused_layers = dict.fromkeys(self.fused_layers, 0)

    @property
    def has_fused_layers(self) -> bool:
        """Tell whether any layer is computed by a function of ours."""
        return any(self.fused_layers.values()) or fused.count(self.model) > 0

    @property
    def fused(self) -> str:
        """Say how many layers of each kind are fused, for the plan."""
        adapted = sum(1 for module in self.model.modules() if getattr(module, "lora_A", None))
        others = (f"{count} {kind}" for kind, count in self.fused_layers.items())
        return ", ".join((f"{fused.count(self.model)} of {adapted} adapted modules", *others))

    @contextlib.contextmanager
    def plain_layers(self) -> Iterator[None]:
        """Let PEFT and transformers compute every layer for a while, for a comparison."""
        with (
            self._nothing_apart(),
            fused.switched_off(self.model),
            exchange.switched_off(self.model),
        ):
            self._set_apart()
            try:
                yield
            finally:
                self._apart.close()

    def run_apart(self, kinds: frozenset[str]) -> None:
        """Run the layers' modules of these classes one example at a time; all others are packed."""
        self._apart.close()
        self.kinds_apart = kinds
        self._set_apart()

    def _set_apart(self) -> None:
        if self.packed is not None and self.kinds_apart:
            self._apart = mixers.run_apart(self.inner, self.decoder, self.packed, self.kinds_apart)

    @contextlib.contextmanager
    def _nothing_apart(self) -> Iterator[None]:
        """Exchange what layers compute below the modules that run one example at a time."""
        self._apart.close()
        try:
            yield
        finally:
            self._set_apart()

    def pad(self) -> None:
        """Go over to padded micro-batches, for a model that packing would compute wrongly."""
        self.run_apart(frozenset())
        packed_attention.switch(self.inner, self.native_attention)
        self.packed = None

    def use_whole_forward(self, why: str) -> None:
        """Go over to padded micro-batches through the model's own forward pass."""
        self.pad()
        self.whole_why = why

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
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=self.dtype)

    def _hidden(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states that predict the targets (N, W), and the targets (N,)."""
        if self.packed is not None:
            return self._packed_hidden(self.packed, batch)
        return self._padded_hidden(batch)

    def _packed_hidden(self, packed: PackedAttention, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        lengths = [len(ids) for ids in batch.ids]
        ids_T = np.concatenate(batch.ids)
        is_target_T = np.concatenate(batch.loss_mask)
        is_target_T[np.cumsum([0, *lengths[:-1]])] = False
        (target_N,) = np.nonzero(is_target_T)
        shared = None
        if self.shares_prefixes and packed.kernel is None:
            shared = prefixes.share(batch.ids)
        packed.lengths, packed.segments = lengths, () if shared is None else shared.segments
        if shared is None:
            positions_T = np.concatenate([np.arange(length) for length in lengths])
            arrays = ids_T, positions_T, target_N - 1
        else:
            arrays = ids_T[shared.source], shared.positions, shared.row[target_N - 1]
        ids, positions, before_N, labels_N = self._uploaded(*arrays, ids_T[target_N])
        output = self.decoder(
            input_ids=ids[None], position_ids=positions[None], **_no_cache(self.decoder)
        )
        hidden_TW = output.last_hidden_state[0]
        if shared is None:
            return hidden_TW[before_N], labels_N
        # Positions repeat: the gradient of an embedding adds them up in one order, indexing in any.
        return F.embedding(before_N, hidden_TW), labels_N

    def _padded_hidden(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        ids, mask, rows_N, before_N, labels_N = self._uploaded(*_padded(batch))
        hidden_BLW = call(self.decoder, ids, mask).last_hidden_state
        return hidden_BLW[rows_N, before_N], labels_N

    def _whole_logits(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return logits that predict the targets (N, V), and the targets (N,)."""
        if self.is_one_by_one and len(batch.ids) > 1:
            singles = [
                self._whole_logits(MicroBatch([ids], [loss_mask]))
                for ids, loss_mask in zip(batch.ids, batch.loss_mask, strict=True)
            ]
            logits, labels = zip(*singles, strict=True)
            return torch.cat(logits), torch.cat(labels)
        ids, mask, rows_N, before_N, labels_N = self._uploaded(*_padded(batch))
        logits_BLV = call(self.model, ids, mask).logits
        return logits_BLV[rows_N, before_N].float(), labels_N

    def _uploaded(self, *arrays: NDArray[np.int64]) -> list[Tensor]:
        """Return the arrays on the device, by one copy that the host does not wait for."""
        flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
        pieces = send(flat, self.device).split([array.size for array in arrays])
        return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


# In place of the head of a model that has none which could be called apart.
NO_HEAD = Head(torch.nn.Identity())


def _padded(batch: MicroBatch) -> list[NDArray[np.int64]]:
    """Return token ids and attention mask (B, L); of the targets (N,) row, column before, label."""
    longest = max(len(ids) for ids in batch.ids)
    ids_BL = np.zeros((len(batch.ids), longest), dtype=np.int64)
    mask_BL = np.zeros_like(ids_BL)
    is_target_BL = np.zeros(ids_BL.shape, dtype=bool)
    for row, (ids, loss_mask) in enumerate(zip(batch.ids, batch.loss_mask, strict=True)):
        ids_BL[row, : len(ids)] = ids
        mask_BL[row, : len(ids)] = 1
        is_target_BL[row, 1 : len(ids)] = loss_mask[1:]
    rows_N, columns_N = np.nonzero(is_target_BL)
    return [ids_BL, mask_BL, rows_N, columns_N - 1, ids_BL[rows_N, columns_N]]


def call(module: Any, ids_BL: Tensor, mask_BL: Tensor) -> Any:
    """Call a decoder or a model, without a cache where its forward pass knows of one."""
    return module(input_ids=ids_BL, attention_mask=mask_BL, **_no_cache(module))


def _no_cache(module: Any) -> dict[str, bool]:
    """Return the argument that switches the cache off, where a forward pass takes it."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    )
