"""A store in memory that fails as told, and runs on a local disk to mirror there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lora_trainer.checkpoint_folder import FILES, MANIFEST, STATE, name_of
from lora_trainer.host.disk import write_checksums
from lora_trainer.remote import lease, mirror
from lora_trainer.remote.folder import RemoteFolder

Fault = Callable[[str, str], BaseException | None]  # of an operation and a path


class FaultyStore(MemoryFileSystem):
    """Files in memory; every operation is counted, and may fail."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    operations: ClassVar[list[tuple[str, str]]] = []
    fault: ClassVar[Fault] = staticmethod(lambda *_: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def _note(self, operation: str, path: str) -> None:
        type(self).operations.append((operation, self._strip_protocol(path)))
        if (error := type(self).fault(operation, path)) is not None:
            raise error

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._note("write", path)
        super().pipe_file(path, value, mode=mode)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self._note("write", rpath)
        super().pipe_file(rpath, Path(lpath).read_bytes())

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        self._note("read", path)
        return super().cat_file(path)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        self._note("read", rpath)
        Path(lpath).write_bytes(super().cat_file(rpath))

    def rm_file(self, path: str) -> None:
        self._note("remove", path)
        super().rm_file(path)

    def find(self, path: str, *_: Any, **options: Any) -> Any:
        self._note("list", path)
        return super().find(path, **options)


fsspec.register_implementation("faulty", FaultyStore, clobber=True)


def reset(patch: pytest.MonkeyPatch) -> None:
    """Empty the store; nothing fails any more, and nothing waits as for a real one."""
    patch.setattr(lease, "SETTLE_SECONDS", 0.01)
    patch.setattr(mirror, "FIRST_PAUSE_SECONDS", 0.001)
    FaultyStore.store, FaultyStore.pseudo_dirs, FaultyStore.operations = {}, [""], []
    FaultyStore.fault = staticmethod(lambda *_: None)


def stored(address: str) -> set[str]:
    """Return the names of what is below an address."""
    root = FaultyStore._strip_protocol(address)
    return {path[len(root) + 1 :] for path in FaultyStore.store if path.startswith(f"{root}/")}


def written(address: str) -> list[str]:
    """Return the names written below an address, in order, without the lock."""
    root = FaultyStore._strip_protocol(address)
    names = [path[len(root) + 1 :] for kind, path in FaultyStore.operations if kind == "write"]
    return [name for name in names if name != ".lock"]


def add_checkpoint(run: Path, step: int, *, best: int | None = None, text: str = "") -> Path:
    """Write a checkpoint that verifies."""
    folder = run / "checkpoints" / name_of(step)
    folder.mkdir(parents=True)
    contents = {name: f"{name} of step {step} {text}".encode() for name in FILES}
    state = {"state": {"step": step, "best_step": best}, "digest": "d"}
    contents[STATE] = json.dumps(state).encode()
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def new_run(folder: Path) -> Path:
    """Write what a run has from its first moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.digest", "config.resolved.json", "events.jsonl", "plan.json"):
        (folder / name).write_text(f"{name}\n")
    return folder


class Mirrored:
    """A run that is mirrored, and the means to wait for it."""

    def __init__(self, address: str, local: Path, keep: int = 2) -> None:
        self.local = new_run(local)
        self.folder = RemoteFolder(address)
        self.lease = lease.Lease(self.folder, self.local)
        self.lease.take()
        self.mirror = mirror.Mirror(self.folder, self.local, self.lease, keep=keep)
        self.mirror.start()

    def end(self) -> None:
        """Stop mirroring, and let others have the folder."""
        self.mirror.stop()
        self.lease.release()


def finish(run: Path) -> None:
    """Write what a finished run has."""
    model = run / "final_model"
    model.mkdir()
    (model / "adapter_model.safetensors").write_bytes(b"weights")
    (model / "adapter_config.json").write_text("{}")
    write_checksums(model)
    (run / "results.json").write_text("{}")
    (run / "DONE").write_text("1\n")
