"""The checkpoints of a run on disk: saved whole or not at all, verified whenever one is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint_folder import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    UnreadableCheckpointError,
    listed,
    make_temporary,
    name_of,
    read_state,
    remove,
    remove_temporaries,
    set_aside,
    state_of_ours,
    step_of,
    verify,
)
from ..errors import AccessError, ConfigError
from ..host.disk import sync
from .checkpoint import Snapshot, TrainState, state_from, try_generators
from .tensor_file import Data, serialized


class OtherRunError(Exception):
    """A sound checkpoint belongs to another run; `digest` names that one."""

    def __init__(self, name: str, digest: str) -> None:
        super().__init__(name)
        self.digest = digest


# What files of other content than ours make their readers raise.
UNFIT = (
    OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    ArithmeticError,
)  # fmt: skip


class CheckpointStore:
    """The checkpoints of one run, in its folder `checkpoints`."""

    def __init__(self, folder: Path, *, keep: int, digest: str | Callable[[], str]) -> None:
        """`digest` names the run; one that is computed meanwhile is asked for when needed.

        An empty one is not compared: rank 0 does that for all.
        """
        self.folder = folder
        self.keep = keep
        self.set_aside: list[Path] = []  # by the last save: what was in the checkpoint's place
        self.initial = ""  # goes into each checkpoint
        # Waits for a checkpoint that is being saved in the background.
        self.before_reading: Callable[[], None] = lambda: None
        self._digest = digest

    @property
    def digest(self) -> str:
        """Return the digest of the run, as soon as it is known."""
        if not isinstance(self._digest, str):
            self._digest = self._digest()
        return self._digest

    def path_of(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / name_of(step)

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, verify it from the disk, then remove what need not be kept.

        Raises:
            OSError: it could not be written; older checkpoints are all still there.
        """
        final = self.path_of(snapshot.state.step)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder)
        temporary = make_temporary(self.folder, final.name)
        try:
            self._write(temporary, snapshot)
            self._make_way(final)
            temporary.replace(final)
        except BaseException:
            remove(temporary)
            raise
        sync(self.folder)
        verify(final)
        self._remove_old(final)
        return final

    def newest(
        self, refuse: Callable[[Snapshot], str] = lambda _: ""
    ) -> tuple[Snapshot | None, list[str]]:
        """Return the newest checkpoint that verifies, and why each newer one is skipped.

        `refuse` returns why a sound one cannot be used either, nothing if it can.

        Raises:
            OtherRunError: there are sound ones, all made by another run.
            AccessError: none can be used, and some may not be read by this user.
            ConfigError: the checkpoints' folder is a file.
        """
        self.before_reading()
        skipped: list[str] = []
        others: list[OtherRunError] = []
        unreadable: list[Path] = []
        for path in reversed(self._listed()):
            try:
                snapshot = self.read(path)
                why = refuse(snapshot)
                if not why:
                    return snapshot, skipped
            except OtherRunError as error:
                others.append(error)
                why = "it belongs to another run"
            except UnreadableCheckpointError as error:
                unreadable.append(path)
                why = str(error)
            except CorruptCheckpointError as error:
                why = str(error)
            skipped.append(f"{path.name}: {why}")
        if unreadable:
            raise _not_allowed(unreadable[0])
        if others:
            raise others[0]
        return None, skipped

    def state_of(self, path: Path) -> tuple[TrainState, dict[str, Any]]:
        """Verify a checkpoint; return its state and all of its state.json.

        Raises:
            CorruptCheckpointError: it does not verify, or is of another step than its name.
            OtherRunError: it belongs to another run.
        """
        verify(path)
        raw = read_state(path)
        if self.digest and raw.get("digest") != self.digest:
            raise OtherRunError(path.name, str(raw.get("digest")))
        state = state_from(raw["state"])
        if state.step != step_of(path.name):
            raise CorruptCheckpointError(f"it contains the checkpoint of step {state.step}")
        return state, raw

    def read(self, path: Path) -> Snapshot:
        """Read a checkpoint that verifies; raises as `state_of` does."""
        state, raw = self.state_of(path)
        try:
            snapshot = Snapshot(
                state=state,
                adapter=load_file(path / "adapter.safetensors"),
                optimizer=load_file(path / "optimizer.safetensors"),
                rng=load_file(path / "rng.safetensors"),
                generators=raw["generators"],
                digest=raw["digest"],
                initial=str(raw.get("initial", "")),
                figures=[str(line) for line in raw.get("figures", [])],
            )
            try_generators(snapshot)
        except UNFIT as error:
            raise CorruptCheckpointError(f"unreadable: {type(error).__name__}") from error
        return snapshot

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        state = {
            "state": asdict(snapshot.state),
            "generators": snapshot.generators,
            "digest": snapshot.digest,
            "initial": self.initial,
            "figures": list(snapshot.figures),
            "torch": torch.__version__,
        }
        contents: dict[str, Iterable[Data]] = {
            "adapter.safetensors": serialized(snapshot.adapter),
            "optimizer.safetensors": serialized(snapshot.optimizer),
            "rng.safetensors": serialized(snapshot.rng),
            STATE: [json.dumps(state).encode()],
        }
        manifest = {name: _write_file(folder / name, data) for name, data in contents.items()}
        _write_file(folder / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        sync(folder)

    def _listed(self) -> list[Path]:
        """Return all that is named like a checkpoint, by step, whether it verifies or not."""
        try:
            return listed(self.folder)
        except PermissionError as error:
            raise _not_allowed(self.folder) from error
        except NotADirectoryError as error:
            raise ConfigError.of(
                "the checkpoints folder is a file",
                where=str(self.folder),
                why="checkpoints are written to a folder of this name",
                remedy=f"mv {self.folder} {self.folder}.old",
            ) from error

    def _make_way(self, final: Path) -> None:
        """Empty a checkpoint's place: an older one of ours goes, anything else is renamed."""
        self.set_aside = []
        if state_of_ours(final, self.digest) is not None:
            remove(final)
        if os.path.lexists(final):
            self.set_aside.append(set_aside(final))

    def _remove_old(self, newest: Path) -> None:
        """Keep the newest and the best of each; any after the newest was skipped as damaged."""
        states = {path: state_of_ours(path, self.digest) for path in listed(self.folder)}
        ours = [path for path, state in states.items() if state is not None]
        own = ours.index(newest) + 1
        kept = set(ours[max(0, own - self.keep) : own])
        # Whoever resumes from one of these needs what was the best by then.
        bests = [(states[path] or {}).get("best_step") for path in kept]
        kept |= {self.path_of(step) for step in bests if isinstance(step, int)}
        for path in ours:
            if path not in kept:
                remove(path)


def _write_file(path: Path, data: Iterable[Data]) -> dict[str, Any]:
    """Write a file to the disk; return its entry in the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in data:
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _not_allowed(path: Path) -> Exception:
    return AccessError.of(
        "no checkpoint can be read",
        where=str(path),
        why=f"this user ({os.getuid()}) has no permission to read it, and no other checkpoint is "
        "valid",
        remedy=f"sudo chown -R {os.getuid()}:{os.getgid()} {path.parent}; chmod -R u+rwX "
        f"{path.parent}",
    )
