"""Checkpoints that survive anything: written beside, synced, sealed by a manifest, renamed.

checkpoints/step-000100/
    adapter.safetensors     the trained parameters, by their names in the model
    optimizer.safetensors   AdamW's moments, by parameter
    rng.safetensors         torch's generators (CPU, and each CUDA device)
    state.json              step, tokens, best evaluation, python's and numpy's generators
    manifest.json           sha256 and size of each of the above, written last

Nothing is pickled. A checkpoint is real when its manifest verifies: every reader goes
by that, so a torn or flipped one is skipped for the one before it. Older ones are
removed only after the new one verified from the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from .disk import sync

FILES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
MANIFEST = "manifest.json"
PREFIX = "step-"
# bitsandbytes keeps its number formats beside each 8-bit state; they never change.
CODES = "qmap"
TEMPORARY = ".writing-"


class CorruptCheckpointError(Exception):
    """A checkpoint does not verify; the text says why."""


class OtherRunError(Exception):
    """A sound checkpoint belongs to another run; `digest` names that one."""

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(name)
        self.digest = digest


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

    def after_step(self, tokens: int, trained_tokens: int, seconds: float) -> TrainState:
        """Return the state one optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens_seen=self.tokens_seen + tokens,
            trained_tokens_seen=self.trained_tokens_seen + trained_tokens,
            train_seconds=self.train_seconds + seconds,
        )

    def after_evaluation(self, loss: float, threshold: float) -> TrainState:
        """Return the state after an evaluation.

        The best is the lowest loss; patience begins anew only where it is lower by more
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


def take_snapshot(
    state: TrainState,
    adapter: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    digest: str,
) -> Snapshot:
    """Copy what a checkpoint holds; `digest` names the run it belongs to."""
    moments = {
        f"{name}.{key}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if not key.startswith(CODES)
    }
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    generators = {
        "python": _to_json(random.getstate()),
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return Snapshot(state, adapter, moments, rng, generators, digest)


def restore_optimizer(
    snapshot: Snapshot,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
) -> None:
    """Put the moments back."""
    places = {
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
            optimizer.init_state(*places[id(parameter)])
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
    kind, keys, position, has_gauss, cached = snapshot.generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


class CheckpointStore:
    """The checkpoints of one run, in its folder `checkpoints`."""

    def __init__(self, folder: Path, *, keep: int, digest: str | Callable[[], str]) -> None:
        """`digest` names the run; one that is computed meanwhile is asked for when needed.

        An empty one is not compared: rank 0 does that for all.
        """
        self.folder = folder
        self.keep = keep
        self._digest = digest

    @property
    def digest(self) -> str:
        """Return the digest of the run, as soon as it is known."""
        if not isinstance(self._digest, str):
            self._digest = self._digest()
        return self._digest

    def path_of(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"{PREFIX}{step:06d}"

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, verify it from the disk, then remove what need not be kept.

        Raises:
            OSError: it could not be written; older checkpoints are all still there.
        """
        final = self.path_of(snapshot.state.step)
        temporary = self.folder / f"{TEMPORARY}{final.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            self._write(temporary, snapshot)
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(self.folder)
        verify(final)
        self._remove_old(final, snapshot.state)
        return final

    def newest(self) -> tuple[Snapshot | None, list[str]]:
        """Return the newest checkpoint that verifies, and the names of newer ones that do not.

        Raises:
            OtherRunError: the newest sound one was made by another run.
        """
        skipped: list[str] = []
        for path in reversed(self._in_order()):
            try:
                return self.read(path), skipped
            except CorruptCheckpointError as error:
                skipped.append(f"{path.name}: {error}")
        return None, skipped

    def read(self, path: Path) -> Snapshot:
        """Read a checkpoint that verifies.

        Raises:
            CorruptCheckpointError: it does not.
            OtherRunError: it belongs to another run.
        """
        verify(path)
        raw = json.loads((path / "state.json").read_text())
        if self.digest and raw["digest"] != self.digest:
            raise OtherRunError(path.name, str(raw["digest"]))
        return Snapshot(
            state=TrainState(**raw["state"]),
            adapter=load_file(path / "adapter.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            rng=load_file(path / "rng.safetensors"),
            generators=raw["generators"],
            digest=raw["digest"],
        )

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        state = {
            "state": asdict(snapshot.state),
            "generators": snapshot.generators,
            "digest": snapshot.digest,
            "torch": torch.__version__,
        }
        contents = {
            "adapter.safetensors": save(snapshot.adapter),
            "optimizer.safetensors": save(snapshot.optimizer),
            "rng.safetensors": save(snapshot.rng),
            "state.json": json.dumps(state).encode(),
        }
        manifest = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        }
        contents[MANIFEST] = json.dumps(manifest, indent=1).encode()
        for name, data in contents.items():
            with (folder / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync(folder)

    def _in_order(self) -> list[Path]:
        """Return the checkpoints' folders by step, whether they verify or not."""
        return sorted(self.folder.glob(f"{PREFIX}*"), key=lambda path: (len(path.name), path.name))

    def _remove_old(self, newest: Path, state: TrainState) -> None:
        """Keep the newest ones and the best; any after the newest was skipped as damaged."""
        steps = self._in_order()
        own = steps.index(newest) + 1
        kept = {path.name for path in steps[max(0, own - self.keep) : own]}
        if state.best_step is not None:
            kept.add(self.path_of(state.best_step).name)
        for path in steps:
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CorruptCheckpointError: a file is missing, of another size, or of other content.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if set(manifest) != set(FILES):
            raise CorruptCheckpointError(f"{MANIFEST} does not name the files of a checkpoint")
        for name in sorted({file.name for file in path.iterdir()} - {*FILES, MANIFEST}):
            raise CorruptCheckpointError(f"{name} is no file of a checkpoint; it was not opened")
        for name, entry in manifest.items():
            data = (path / name).read_bytes()
            if len(data) != entry["bytes"]:
                raise CorruptCheckpointError(f"{name} has {len(data)} bytes of {entry['bytes']}")
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise CorruptCheckpointError(f"{name} has changed since it was written")
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{Path(str(error.filename)).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"unreadable: {type(error).__name__}") from error


def _to_json(value: Any) -> Any:
    return [_to_json(part) for part in value] if isinstance(value, tuple) else value


def _to_tuple(value: Any) -> Any:
    return tuple(_to_tuple(part) for part in value) if isinstance(value, list) else value
