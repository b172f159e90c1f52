"""Count the memory of a step beyond weights and optimizer states.

Two truncated copies of the real model, with a few layers each, are built on the meta device with
the run's adapter and go through a step of the run's own code; the difference is the memory of a
layer. Nothing is computed: a count takes some tenths of a second.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..config.schema import Config
from ..machine import Device
from ..memory_estimate import Precision, Work, loss_chunk
from . import attention as packed_attention
from . import compat, packed_linear, quantize, sizes
from .adapter import add_adapter, trainable_parameters
from .flash import VariableLength
from .forward import CausalLM, MicroBatch
from .live_bytes import AsOnDevice, LiveBytes, attend
from .precision import dtype_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROBED_TOKENS = 16
# The most layers that are built where a model's repeat in a pattern.
LONGEST_PERIOD = 8
LONGEST_FAULT = 200


class Footprint:
    """Counts a process's work for plans of any batch: `footprint(work)` returns bytes.

    `build` makes the base model of a configuration on the meta device. `kernel` is the one
    for variable lengths, `kinds_apart` are the classes of modules that run one example at a time.
    `faults` says why a model could not be counted; its works are 0.
    """

    def __init__(
        self,
        config: Config,
        base_config: PretrainedConfig,
        build: Callable[[Any], Any],
        *,
        device: Device,
        precision: Precision,
        attention: str,
        padding_free: bool,
        kernel: VariableLength | None = None,
        kinds_apart: frozenset[str] = frozenset(),
    ) -> None:
        self._config = config
        self._base_config = base_config
        self._build = build
        self._device = device
        vocabulary = sizes.vocabulary(base_config)
        self._chunk = loss_chunk(config.training, vocabulary, device)
        self._precision = precision
        self._attention = attention
        self._padding_free = padding_free
        self._kinds_apart = kinds_apart
        self._kernel = None if kernel is None else _CountedKernel(kernel, device)
        self._models: dict[tuple[int, int, bool], CausalLM] = {}
        self._counted: dict[Work, int] = {}
        self.faults: tuple[str, ...] = ()

    def __call__(self, work: Work) -> int:
        """Return the most bytes that live at once in `work`, weights and states left out."""
        if work not in self._counted:
            try:
                with _other_attention(), _small_heap():
                    self._counted[work] = self._count(work)
            except Exception as error:  # models do what they like, on no device but their own too
                text = (str(error).strip().splitlines() or [""])[0][:LONGEST_FAULT]
                why = f"{type(error).__name__}: {text}"
                self.faults = (f"the estimate excludes the memory of a step: {why}",)
                self._counted[work] = 0
        return self._counted[work]

    def _count(self, work: Work) -> int:
        layers = sizes.layers(self._base_config) or 1
        first, second = cuts(self._base_config)
        least = self._phases(first, work)
        if first == second:
            return max(least)
        most = self._phases(second, work)
        return int(
            max(
                a + (layers - first) * (b - a) / (second - first)
                for a, b in zip(least, most, strict=True)
            )
        )

    def _phases(self, layers: int, work: Work) -> tuple[int, ...]:
        """Return the peaks of forward and backward pass of the model's first layers."""
        causal = self._model(layers, work.bits, work.is_training and work.gradient_checkpointing)
        mode, live = AsOnDevice(self._device, self._has_kernel), LiveBytes()
        if work.is_training and work.gradient_checkpointing:
            _resume_casts(causal, mode)
        live.ignore(iter((*causal.model.parameters(), *causal.model.buffers())))
        trainable = list(trainable_parameters(causal.model).values())
        causal.model.train(work.is_training)
        # A sweep of Python's collector would free what the model keeps in cycles sooner or later.
        gc.collect()
        if causal.packed is not None:
            _register(causal.packed)
        with mode.running(), live:
            if not work.is_training:
                with torch.no_grad(), causal.autocast():
                    _score(causal, batch_of(work))
                return (live.peak,)
            if work.accumulates:
                for parameter in trainable:
                    parameter.grad = torch.zeros_like(parameter)
            loss = causal.loss(batch_of(work))
            forward, live.peak = live.peak, live.now
            loss.backward()
            del loss
            live.sweep()
        for parameter in trainable:
            parameter.grad = None
        return forward, live.peak, live.now

    def _has_kernel(self, query: Tensor, is_masked: bool, dropout: float) -> bool:
        if self._device != "cpu":
            return True  # flash and memory-efficient attention keep the same
        return _has_cpu_kernel(query.dtype, query.shape[1], query.shape[-1], is_masked, dropout)

    def _model(self, layers: int, bits: int, is_checkpointed: bool) -> CausalLM:
        key = layers, bits, is_checkpointed
        if key not in self._models:
            self._models[key] = self._make_model(layers, bits)
            if is_checkpointed:
                compat.enable_checkpointing(self._models[key].inner)
        return self._models[key]

    def _make_model(self, layers: int, bits: int) -> CausalLM:
        base = self._build(cut_config(self._base_config, layers))
        base.config._attn_implementation = self._attention
        base.config.use_cache = False
        base.requires_grad_(False)
        dtype = dtype_of(self._precision)
        for parameter in base.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if bits < 16:
            packed_linear.pack(base, bits, self._device, dtype)
            quantize.prepare(base)
        # PiSSA and OLoRA decompose weights, which are not there.
        lora = self._config.lora.model_copy(update={"init_lora_weights": True})
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = add_adapter(base, lora, seed=0)
        packed_linear.adapt(model)
        causal = CausalLM(
            model,
            device="meta",
            padding_free=self._padding_free,
            chunk=self._chunk,
            precision=self._precision,
            kernel=self._kernel,
        )
        causal.run_apart(self._kinds_apart)
        return causal


class _CountedKernel(VariableLength):
    """A kernel for variable lengths on the meta device."""

    def __init__(self, real: VariableLength, device: str) -> None:
        super().__init__(real.kernel)
        self._device = device

    def __call__(self, query_THD: Any, key_THD: Any, value_THD: Any, *_: Any, **__: Any) -> Any:
        """Return an output like the queries."""
        dtype = query_THD.dtype
        if torch.float32 in (dtype, key_THD.dtype, value_THD.dtype):
            half = torch.float16 if value_THD.dtype == torch.float16 else torch.bfloat16
            query_THD, key_THD, value_THD = (
                part.to(half) for part in (query_THD, key_THD, value_THD)
            )
        return attend(query_THD, key_THD, value_THD, self._device).to(dtype)


def cuts(config: PretrainedConfig) -> tuple[int, int]:
    """Return two numbers of layers that differ by a period of the model's layers.

    Two equal ones are all of the layers: where these follow no pattern, or are few.
    """
    layers = sizes.layers(config) or 1
    lists = [v for v in vars(sizes.text_config(config)).values() if _is_each(v, layers)]
    dense = getattr(sizes.text_config(config), "first_k_dense_replace", 0) or 0
    for period in range(1, LONGEST_PERIOD + 1):
        first = max(2, period + dense)
        if first + period >= layers:
            break
        if all(v[i] == v[i + period] for v in lists for i in range(dense, layers - period)):
            return first, first + period
    return layers, layers


def cut_config(config: PretrainedConfig, layers: int) -> Any:
    """Return a copy of a configuration with fewer layers, and what it lists for each of them."""
    cut = copy.deepcopy(config)
    text, count = sizes.text_config(cut), sizes.layers(config)
    for name, value in list(vars(text).items()):
        if _is_each(value, count):
            setattr(text, name, value[:layers])
    for name in sizes.DEPTHS:
        if getattr(text, name, None) == count:
            setattr(text, name, layers)
            break
    return cut


def _is_each(value: object, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers


def batch_of(work: Work) -> MicroBatch:
    """Return the examples of a micro-batch, the last tokens of each supervised."""
    masks = []
    for length in work.lengths:
        is_training = np.zeros(length, dtype=bool)
        is_training[max(0, length - work.supervised_tokens) :] = True
        masks.append(is_training)
    return MicroBatch([np.zeros(length, dtype=np.int64) for length in work.lengths], masks)


def _score(causal: CausalLM, batch: MicroBatch) -> None:
    """Do what `CausalLM.score` does up to the figures, which a meta tensor does not have."""
    if causal.whole_why:
        causal._whole_logits(batch)
        return
    hidden_NW, labels_N = causal._hidden(batch)
    for start in range(0, len(labels_N), causal.chunk):
        logits = causal.head(hidden_NW[start : start + causal.chunk])
        F.cross_entropy(logits, labels_N[start : start + causal.chunk], reduction="sum")


def _resume_casts(causal: CausalLM, mode: AsOnDevice) -> None:
    """Have checkpointed layers computed again as they were at first."""
    for module in causal.inner.modules():
        own = getattr(module, "_gradient_checkpointing_func", None)
        if own is not None:
            function = own.func if isinstance(own, partial) else own
            module._gradient_checkpointing_func = partial(
                function, use_reentrant=False, context_fn=mode.resume_autocast
            )


@contextlib.contextmanager
def _small_heap() -> Iterator[None]:
    """Let Python's collector look at new objects only: those of the libraries are many."""
    if gc.get_freeze_count():  # the caller's, which a thaw would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _other_attention() -> Iterator[None]:
    """Give transformers the run's own attention back in the end."""
    registry = _registry()
    before = registry.get(packed_attention.NAME, None)
    try:
        yield
    finally:
        if before is not None:
            _register(before)


def _register(attention: Any) -> None:
    packed_attention._register(_registry(), attention)


def _registry() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@cache
def _has_cpu_kernel(
    dtype: torch.dtype, heads: int, width: int, is_masked: bool, dropout: float
) -> bool:
    """Ask PyTorch whether it has a kernel for such an attention on this CPU."""
    part = torch.zeros(1, heads, PROBED_TOKENS, width, dtype=dtype, requires_grad=True)
    mask = torch.zeros(PROBED_TOKENS, PROBED_TOKENS, dtype=dtype) if is_masked else None
    try:
        return bool(torch._fused_sdp_choice(part, part, part, mask, dropout, not is_masked))
    except (AttributeError, RuntimeError, TypeError):  # not PyTorch's public interface
        return False
