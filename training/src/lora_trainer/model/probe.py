"""Verify on the loaded model that our fast paths compute the same as the model itself.

Fast paths could be silently wrong for a model: examples are concatenated, and decoder and head are
called separately. Each path is compared, on a few random tokens, with the model's own forward pass
on each example alone, and tried with a backward pass. A path that differs or raises falls back to
the next: packed with a variable-length kernel, packed with attention one example at a time, either
with mixers one example at a time too, padded, the model's own forward pass over padded examples,
and over one example at a time. A model for which no path works is rejected by name, as is one that
sees later tokens. A quantized base model is compared with itself in the same precision, so the
tolerance is not larger.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from ..errors import ConfigError, TrainerError
from ..faults import is_out_of_memory
from . import mixers, samples, sizes
from .attention import PackedAttention, switch
from .forward import CausalLM, MicroBatch, call
from .quantize import rows_apart

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")

# Largest difference of a mean token loss that rounding explains.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# The same tokens before another one: nothing but noise may be between them.
SAME = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
NEAR = 8  # tokens
LONGEST_REASON = 200
LOOKS_AHEAD = (
    "its predictions depend on later tokens: it is not a causal language model, or its "
    "configuration (is_decoder, causal) is wrong"
)
TEXT_ALONE = "its own forward pass fails on text without other inputs"
OTHER_RANK = "fail in another process"


class Float16OverflowError(Exception):
    """The base model's own loss is not finite in float16, which ends at 65,504."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean token loss of our path less the model's own, on the same tokens."""

    value: float
    tolerance: float

    @property
    def is_small(self) -> bool:
        """Return whether rounding explains it."""
        return bool(np.isfinite(self.value)) and abs(self.value) <= self.tolerance


def verify(causal: CausalLM, is_any: Callable[[bool], bool] = bool) -> str:
    """Find the fastest way that is exact, and leave `causal` on it.

    Several ranks decide together: `is_any` tells whether any of them says so. Returns a
    sentence for the plan when a slower way is used instead, else an empty string.

    Raises:
        ConfigError: no way computes what the model itself does, or it cannot be trained.
        Float16OverflowError: its own forward pass overflows in float16.
    """
    was_training = causal.model.training
    causal.model.eval()
    try:
        with rows_apart(causal.inner), _near_thresholds(causal.inner):
            return _verify(causal, is_any)
    finally:
        causal.model.train(was_training)


def verify_sharing(causal: CausalLM, is_any: Callable[[bool], bool] = bool) -> str:
    """Have prefixes shared, if that is exact; else return why it is not.

    `verify` left `causal` on concatenated examples before.
    """
    was_training = causal.model.training
    causal.model.eval()
    causal.shares_prefixes = True
    try:
        with rows_apart(causal.inner), _near_thresholds(causal.inner):
            batch = samples.examples_that_begin_alike(causal.inner)
            fault = _fault(causal, batch, _own_loss(causal, batch))
    finally:
        causal.model.train(was_training)
    causal.shares_prefixes = not is_any(bool(fault))
    return "" if causal.shares_prefixes else f"examples that share them {fault or OTHER_RANK}"


def _verify(causal: CausalLM, is_any: Callable[[bool], bool]) -> str:
    batch = samples.random_examples(causal.inner)
    if causal.is_sharded:  # an error here is one of how layers are shared out, named elsewhere
        own, fault = _own_loss(causal, batch), ""
    else:
        own, fault = _attempted(lambda: _own_loss(causal, batch), 0.0)
    if is_any(bool(fault)):
        raise refusal(causal.inner.config, f"{TEXT_ALONE}: {fault or OTHER_RANK}")
    if is_any(causal.precision == "float16" and not np.isfinite(own)):
        raise Float16OverflowError
    ahead, fault = _attempted(lambda: _looks_ahead(causal, batch), 0.0)
    if is_any(bool(fault) or not Difference(ahead, SAME[causal.precision]).is_small):
        raise refusal(causal.inner.config, LOOKS_AHEAD)
    if not causal.has_fused_layers:
        return _choose_way(causal, batch, own, is_any)
    if not is_any(bool(_fault(causal, batch, own))):
        return _why_whole(causal) or _left_to_pytorch(causal)
    with causal.plain_layers():
        reason = _choose_way(causal, batch, own, is_any)
    fault = _fault(causal, batch, own)
    if not is_any(bool(fault)):
        return reason
    causal.leave_layers_alone()
    left = f"no layers are fused: fused layers {fault or OTHER_RANK}"
    return "; ".join(filter(None, (left, reason)))


@contextlib.contextmanager
def _near_thresholds(model: Any) -> Iterator[None]:
    """Have short examples cross Llama 4's chunks, and the length at which it scales queries."""
    config = sizes.text_config(model.config)
    owners = [(module, "floor_scale") for module in model.modules()]
    owners.append((config, "attention_chunk_size"))
    before = [(one, name, value) for one, name in owners if (value := getattr(one, name, None))]
    try:
        for owner, name, value in before:
            setattr(owner, name, min(value, NEAR))
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _choose_way(
    causal: CausalLM, batch: MicroBatch, own: float, is_any: Callable[[bool], bool]
) -> str:
    """Leave `causal` on the fastest way that is exact; return why it is none of the faster ones."""
    reasons: list[str] = []
    if causal.packed is not None:
        reasons, fault = _pack(causal, batch, own, is_any)
        if not fault:
            return "; ".join(reasons)
        reasons = [*reasons, f"padding is used: concatenated examples {fault}"]
        causal.pad()
    if not causal.whole_why:
        fault = _fault(causal, batch, own)
        if not is_any(bool(fault)):
            return "; ".join(reasons)
        fault = f"decoder and head, called separately, {fault or OTHER_RANK}"
        if causal.is_sharded:  # the model's own forward pass would not gather the layers
            raise refusal(causal.inner.config, fault)
        causal.use_whole_forward(fault)
    fault = _fault(causal, batch, own)
    if not is_any(bool(fault)):
        return _why_whole(causal)
    causal.is_one_by_one = True
    why = f"padded examples {fault or OTHER_RANK}"
    fault = _fault(causal, batch, own)
    if is_any(bool(fault)):
        raise refusal(causal.inner.config, f"one example at a time, {fault or OTHER_RANK}")
    return f"examples are computed one at a time: {why}"


def _pack(
    causal: CausalLM, batch: MicroBatch, own: float, is_any: Callable[[bool], bool]
) -> tuple[list[str], str]:
    """Leave `causal` on the fastest packed way; return notes, and what is wrong with all."""
    packed = causal.packed
    assert packed is not None
    kernel = packed.kernel
    reasons, fault = _choose_kernel(causal, batch, own, is_any)
    if not fault:
        return reasons, ""
    none: frozenset[str] = frozenset()
    kinds, _ = _attempted(lambda: _mixers(causal, packed, batch), none)
    if not is_any(bool(kinds)):
        return reasons, fault
    packed.kernel = kernel
    causal.run_apart(kinds)
    kept, still = _choose_kernel(causal, batch, own, is_any)
    if still:
        return reasons, fault
    names = ", ".join(sorted(kinds)) or "mixers in another process"
    return [f"one example at a time: {names}: concatenated examples {fault}", *kept], ""


def _choose_kernel(
    causal: CausalLM, batch: MicroBatch, own: float, is_any: Callable[[bool], bool]
) -> tuple[list[str], str]:
    """Keep the attention kernel if it is exact; return notes, and what is wrong without it."""
    fault = _fault(causal, batch, own)
    if not is_any(bool(fault)):
        return list(filter(None, [_left_to_pytorch(causal)])), ""
    packed = causal.packed
    assert packed is not None
    kernel, packed.kernel = packed.kernel, None
    if not is_any(kernel is not None):
        return [], fault or OTHER_RANK
    name = kernel.kernel.name if kernel is not None else "the attention kernel"
    reason = f"{name} is not used: concatenated examples {fault or OTHER_RANK}"
    fault = _fault(causal, batch, own)
    return [reason], (fault or OTHER_RANK) if is_any(bool(fault)) else ""


def _mixers(causal: CausalLM, packed: PackedAttention, batch: MicroBatch) -> frozenset[str]:
    """Return which modules carry information from one concatenated example to the next."""
    tolerance = TOLERANCES[causal.precision]
    return mixers.find(causal.decoder, packed, lambda: _loss(causal, batch), tolerance)


def _left_to_pytorch(causal: CausalLM) -> str:
    """Say which layers the attention kernel does not compute; empty where there are none."""
    packed = causal.packed
    if packed is None or packed.kernel is None or not packed.has_sinks:
        return ""
    name = packed.kernel.kernel.name
    return f"{name} does not support attention sinks: layers with sinks run one example at a time"


def _why_whole(causal: CausalLM) -> str:
    """Say why the model's own forward pass is used; empty where it is not."""
    if not causal.whole_why:
        return ""
    return f"padding is used, and logits of every token are computed: {causal.whole_why}"


def overflows_float16(causal: CausalLM) -> bool:
    """Return whether a model computes in float16 and its own loss is not finite there."""
    return causal.precision == "float16" and not np.isfinite(
        _own_loss(causal, samples.random_examples(causal.inner))
    )


def check_unloaded(model: Any) -> None:
    """Try a model without weights, on the meta device, on plain tokens.

    Raises:
        ConfigError: its code asks for something else, such as an image.
    """
    ids_1T = torch.zeros((1, max(samples.LENGTHS)), dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            call(model, ids_1T, torch.ones_like(ids_1T))
    except (ValueError, TypeError) as error:
        if "meta" not in str(error).lower():
            raise refusal(model.config, f"{TEXT_ALONE}: {first_line(error)}") from error
    except Exception:  # what cannot be computed without weights says nothing of the model
        return


def refusal(config: PretrainedConfig, why: str) -> TrainerError:
    """Return the error of a model that cannot be trained here, by the name of its type."""
    return ConfigError.of(
        f"models of type {config.model_type} are not supported",
        where="model_name_or_path",
        why=why,
        remedy="use another base model; docs/architectures.md lists the supported ones",
    )


def _fault(causal: CausalLM, batch: MicroBatch, own: float) -> str:
    """Say what is wrong with the way that `causal` is on; empty where it is exact."""
    ours, fault = _attempted(lambda: _loss(causal, batch), 0.0)
    if fault:
        return f"fail: {fault}"
    difference = Difference(ours - own, TOLERANCES[causal.precision])
    if not difference.is_small:
        return f"differ by {difference.value:.1e}"
    if causal.is_sharded:
        return ""
    _, fault = _attempted(lambda: _train_step(causal, batch), 0.0)
    return f"fail in training: {fault}" if fault else ""


def _attempted(compute: Callable[[], T], failed: T) -> tuple[T, str]:
    """Return what was computed, or which error was raised; memory that ran out is no fault."""
    try:
        return compute(), ""
    except TrainerError:
        raise
    except Exception as error:  # a model's code raises what it likes
        if is_out_of_memory(error):
            raise
        return failed, first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of what a model's code raised, cut where it is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."


@torch.no_grad()
def _loss(causal: CausalLM, batch: MicroBatch) -> float:
    return causal.score(batch)[0] / batch.targets


def _train_step(causal: CausalLM, batch: MicroBatch) -> float:
    """Run a backward pass in training mode; leave neither gradients nor random numbers behind."""
    parameters = [p for p in causal.model.parameters() if p.requires_grad]
    causal.model.train()
    try:
        with torch.random.fork_rng(devices=_devices(causal)):
            loss = causal.loss(batch)
            if loss.requires_grad:
                loss.backward()
    finally:
        for parameter in parameters:
            parameter.grad = None
        causal.model.eval()
    return 0.0


def _devices(causal: CausalLM) -> list[int]:
    return [torch.cuda.current_device()] if causal.device.startswith("cuda") else []


def exercise(causal: CausalLM) -> None:
    """Run the model forward and backward once, on the examples that `verify` uses."""
    try:
        causal.loss(samples.random_examples(causal.inner)).backward()
    finally:
        causal.model.zero_grad(set_to_none=True)


@torch.no_grad()
def _own_loss(causal: CausalLM, batch: MicroBatch) -> float:
    """Return the mean token loss of the model's own forward, one example at a time."""
    with _eager(causal):
        total = sum(float(_own_losses(causal, ids).sum()) for ids in batch.ids)
    return total / batch.targets


@torch.no_grad()
def _looks_ahead(causal: CausalLM, batch: MicroBatch) -> float:
    """Return how far the losses of an example's tokens change with the token after them."""
    ids = max(batch.ids, key=len)
    other = ids.copy()
    other[-1] = (other[-1] + 1) % sizes.vocabulary(causal.inner.config)
    with _eager(causal):
        apart = _own_losses(causal, ids)[:-1] - _own_losses(causal, other)[:-1]
    return float(apart.abs().mean())


@contextlib.contextmanager
def _eager(causal: CausalLM) -> Iterator[None]:
    """Leave projections to PEFT and attention to eager, which takes every argument of a model.

    sdpa raises, or leaves some out.
    """
    before = switch(causal.inner, "eager")
    try:
        with causal.plain_layers():
            yield
    finally:
        switch(causal.inner, before)


def _own_losses(causal: CausalLM, ids: NDArray[np.int64]) -> torch.Tensor:
    """Return the losses of an example's tokens but the first, by the model's own forward."""
    ids_1T = torch.from_numpy(ids).to(causal.device)[None]
    with causal.autocast():
        # Given no mask, a few classes make one that takes each pad token for padding.
        output = call(causal.model, ids_1T, torch.ones_like(ids_1T))
    return F.cross_entropy(output.logits[0, :-1].float(), ids_1T[0, 1:], reduction="none")
