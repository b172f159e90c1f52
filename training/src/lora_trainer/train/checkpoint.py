"""Checkpoints: written to a temporary folder, fsynced, sealed by a manifest, renamed.

checkpoints/step-000100/
    adapter.safetensors     the trained parameters, by their names in the model
    optimizer.safetensors   AdamW's moments, by parameter
    rng.safetensors         torch's generators (CPU, and each CUDA device)
    state.json              step, tokens, best evaluation, float16's loss scale, python's and
                            numpy's generators
    manifest.json           sha256 and size of each of the above, written last

Nothing is pickled. A checkpoint is valid if its manifest verifies and its state has the step in the
folder's name; readers skip anything else and use the previous one. Older ones are removed only
after the new one was verified from disk, and only checkpoints of this run are ever removed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ..checkpoint_folder import STATE, CorruptCheckpointError
from .loss_scale import LossScale

Kind = TypeVar("Kind")

# bitsandbytes keeps its number formats beside each 8-bit state; they never change.
CODES = "qmap"
# Tensors by the file they belong to and their name in it.
Named = dict[tuple[str, str], Tensor]


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run is; everything else follows from it and the configuration."""

    step: int = 0
    tokens_seen: int = 0
    trained_tokens_seen: int = 0
    train_seconds: float = 0.0
    evaluated_step: int = -1
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    loss_scale: LossScale | None = None  # of float16; other precisions have none

    def after_step(
        self,
        tokens: int,
        trained_tokens: int,
        seconds: float,
        loss_scale: LossScale | None = None,
    ) -> TrainState:
        """Return the state one optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens_seen=self.tokens_seen + tokens,
            trained_tokens_seen=self.trained_tokens_seen + trained_tokens,
            train_seconds=self.train_seconds + seconds,
            loss_scale=loss_scale,
        )

    def after_evaluation(self, loss: float, threshold: float) -> TrainState:
        """Return the state after an evaluation.

        The best is the lowest loss; patience starts over only where it is lower by more
        than `threshold`. The evaluation before the first step is no candidate, and one that is
        not finite says nothing of either.
        """
        evaluated = replace(self, evaluated_step=self.step)
        if self.step == 0 or not math.isfinite(loss):
            return evaluated
        best = math.inf if self.best_eval_loss is None else self.best_eval_loss
        is_enough = loss < best - threshold
        without = 0 if is_enough else self.evaluations_without_better + 1
        evaluated = replace(evaluated, evaluations_without_better=without)
        if loss < best:
            return replace(evaluated, best_eval_loss=loss, best_step=self.step)
        return evaluated


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint's content in memory."""

    state: TrainState
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    generators: dict[str, Any]
    digest: str
    initial: str = ""  # digest of the first adapter, where its init changes the base (initial.py)
    figures: Sequence[str] = ()  # what the recording may lack of the way here (unrecorded.py)


def to_host(tensors: Named) -> Named:
    """Return contiguous copies in host memory."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def take_snapshot(
    state: TrainState,
    adapter: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    digest: str = "",
    *,
    copy: Callable[[Named], Named] = to_host,
) -> Snapshot:
    """Copy what a checkpoint holds; `digest` names the run it belongs to."""
    tensors = {("adapter", name): tensor.detach() for name, tensor in adapter.items()}
    tensors |= {
        ("optimizer", f"{name}.{key}"): torch.as_tensor(value).detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if not key.startswith(CODES)
    }
    copies: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}}
    for (file, name), tensor in copy(tensors).items():
        copies[file][name] = tensor
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        rng |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    generators = {
        "python": _to_json(random.getstate()),
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return Snapshot(state, copies["adapter"], copies["optimizer"], rng, generators, digest)


def restore_optimizer(
    snapshot: Snapshot,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
) -> None:
    """Restore AdamW's moments; the learning rate comes from the plan."""
    groups = {
        id(parameter): (group, parameter, number, index)
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }
    for name, parameter in parameters.items():
        prefix = f"{name}."
        own = {
            key.removeprefix(prefix): value
            for key, value in snapshot.optimizer.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        if own and hasattr(optimizer, "init_state"):
            # bitsandbytes' state has buffers of its own kinds, paged ones among them.
            optimizer.init_state(*groups[id(parameter)])
            _fill(optimizer.state[parameter], own)
        elif own:
            # AdamW keeps `step` on the CPU and its moments beside the parameter.
            optimizer.state[parameter] = {
                key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
                for key, value in own.items()
            }


def _fill(state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into a state's own buffers; a step is a number there."""
    for key, value in saved.items():
        if isinstance(state[key], Tensor):
            state[key].copy_(value)
        else:
            state[key] = int(value)


def restore_generators(snapshot: Snapshot) -> None:
    """Put every random number generator back."""
    torch.set_rng_state(snapshot.rng["cpu"])
    cuda = [snapshot.rng[key] for key in sorted(snapshot.rng) if key.startswith("cuda")]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(_to_tuple(snapshot.generators["python"]))
    np.random.set_state(_numpy_state(snapshot))


def state_from(raw: Mapping[str, Any]) -> TrainState:
    """Return the state that a state.json holds.

    Raises:
        CorruptCheckpointError: a key is unknown, or its value of another type.
    """
    scale = raw.get("loss_scale")
    if isinstance(scale, Mapping):
        raw = {**raw, "loss_scale": _typed(LossScale, scale)}
    return _typed(TrainState, raw)


def _typed(kind: type[Kind], raw: Mapping[str, Any]) -> Kind:
    hints = get_type_hints(kind)
    for name, value in raw.items():
        if name not in hints:
            raise CorruptCheckpointError(f"{STATE} has an unknown key: {name[:40]!r}")
        if not _is_of(hints[name], value):
            raise CorruptCheckpointError(f"{STATE}: {name} is a {type(value).__name__}")
    return kind(**raw)


def _is_of(hint: Any, value: Any) -> bool:
    """Return whether a value of JSON is of a field's type; a whole number is a float too."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def misfit(snapshot: Snapshot, parameters: Mapping[str, torch.nn.Parameter]) -> str:
    """Return what a checkpoint holds that these parameters cannot take; nothing if all fits."""
    if snapshot.adapter.keys() != parameters.keys():
        return "its adapter has other parameters than this model's"
    for name, parameter in parameters.items():
        moments = [snapshot.optimizer.get(f"{name}.{key}") for key in ("exp_avg", "exp_avg_sq")]
        for tensor in (snapshot.adapter[name], *moments):
            if tensor is not None and tensor.shape != parameter.shape:
                return f"{name} has the shape {tuple(tensor.shape)}"
    return ""


def try_generators(snapshot: Snapshot) -> None:
    """Try a checkpoint's random number generators on ones of no consequence."""
    random.Random().setstate(_to_tuple(snapshot.generators["python"]))  # noqa: S311
    np.random.RandomState().set_state(_numpy_state(snapshot))
    torch.Generator().set_state(snapshot.rng["cpu"])


def _numpy_state(snapshot: Snapshot) -> tuple[Any, ...]:
    kind, keys, position, has_gauss, cached = snapshot.generators["numpy"]
    return kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached


def _to_json(value: object) -> Any:
    return [_to_json(part) for part in value] if isinstance(value, tuple) else value


def _to_tuple(value: object) -> Any:
    return tuple(_to_tuple(part) for part in value) if isinstance(value, list) else value
