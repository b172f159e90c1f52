"""`initial_adapter/`: the adapter as initialized, for PiSSA and OLoRA, which change the base.

The export subtracts it, so that the trained adapter fits the untouched base. One flipped byte in
it would export another adapter: a manifest seals it, and each checkpoint names the weights that its
run began with. A start initialises the same adapter again, which replaces a damaged folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StorageError, UnavailableError
from ..host.disk import follow_umask, sync
from ..run_folder import RunFolder

MANIFEST = "manifest.json"
FILES = ("adapter_config.json", "adapter_model.safetensors")


class DamagedInitialError(Exception):
    """The folder does not verify; the text says why."""


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a sha256 over weights and their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(model: Any, folder: Path, digest: str = "") -> Path:
    """Write the model's adapter, whose weights `digest` names; whole or not at all."""
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(str(beside), safe_serialization=True)
    files = {name: _sha256(beside / name) for name in FILES}
    (beside / MANIFEST).write_text(json.dumps({"weights": digest, "files": files}, indent=1))
    follow_umask(beside)
    for path in (*beside.iterdir(), beside):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)
    sync(folder.parent)
    return folder


def verify(folder: Path) -> str:
    """Check a folder against its manifest; return the digest of its weights.

    Raises:
        DamagedInitialError: a file is missing or has changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in FILES:
            if _sha256(folder / name) != manifest["files"][name]:
                raise DamagedInitialError(f"{name} has changed since it was written")
        return str(manifest["weights"])
    except FileNotFoundError as error:
        raise DamagedInitialError(f"{Path(str(error.filename)).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedInitialError(f"unreadable: {type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class Initial:
    """The folder of a run, and the digest of the weights that this start was initialised with."""

    folder: Path
    digest: str

    def settle(self, model: Any, expected: str) -> str:
        """Have a sound folder before training; the model's adapter is as initialised still.

        `expected` is the digest that a checkpoint names; none at a fresh start, or where an
        earlier version saved the checkpoint. Returns what is worth a warning.

        Raises:
            UnavailableError: the folder is not sound, and this start came out differently.
        """
        try:
            kept, why = verify(self.folder), ""
        except DamagedInitialError as error:
            kept, why = "", str(error)
        if self.digest == (expected or self.digest):
            if kept != self.digest:
                save(model, self.folder, self.digest)
            return (
                f"{RunFolder.initial_adapter} was damaged ({why}) and has been rewritten"
                if expected and why
                else ""
            )
        if kept == expected:
            return (
                "the initial adapter differs here (another machine, library or number of "
                f"threads): {RunFolder.initial_adapter} of the first start is used"
            )
        raise UnavailableError.of(
            "the initial adapter of this run is missing",
            where=str(self.folder),
            why=f"{why or 'it belongs to another run'}, and initialization differs here (another "
            "machine, library or number of threads)",
            remedy=f"restore {RunFolder.initial_adapter} from a copy, resume on the machine of the "
            "first start, or start over with --resume never (this run is archived, not removed)",
        )


def verified(folder: Path, expected: str = "") -> Path:
    """Return the folder if it is sound and of the run that a checkpoint belongs to.

    Raises:
        StorageError: it is not.
    """
    try:
        kept = verify(folder)
        why = "" if kept == (expected or kept) else "it belongs to another run"
    except DamagedInitialError as error:
        why = str(error)
    if not why:
        return folder
    raise StorageError.of(
        f"{RunFolder.initial_adapter} is damaged",
        where=str(folder),
        why=f"{why}; the export subtracts this adapter from the trained one",
        remedy="run the same command again: it rewrites the folder",
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
