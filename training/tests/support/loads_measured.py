"""One load of a base model in a process of its own, and the host memory that it takes."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils

from lora_trainer.config.schema import ModelSection
from lora_trainer.model.compat import MAJOR
from lora_trainer.model.load import ModelSource, load_model

_open = transformers.modeling_utils.safe_open


class MetaFile:
    """A file of weights whose slices go to the device as they are read, for transformers 4.

    safetensors does that for a GPU; it does not know the device `meta`.
    """

    def __init__(self, path: str, framework: str, device: str = "cpu", **arguments: Any) -> None:
        self._file = _open(path, framework=framework, **arguments)
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> MetaFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> Any:
        """Return a weight that is read when it is indexed."""
        return MetaSlice(self._file.get_slice(name), self._device)


class MetaSlice:
    """One weight of a `MetaFile`."""

    def __init__(self, weight: Any, device: str) -> None:
        self._weight, self._device = weight, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        weight: torch.Tensor = self._weight[index]
        return weight.to(self._device)


def measured(_ranks: Any, folder: Path, warmup: Path, dtype: str, device: str) -> dict[str, Any]:
    """Load a model; return the most anonymous memory on the way, beyond what was there before.

    Pages of a mapped file are the kernel's cache, which it takes back when memory is short.
    The device `meta` takes no memory: what is measured is the host's alone.
    """
    if MAJOR < 5:
        transformers.modeling_utils.safe_open = MetaFile
    _load(warmup, dtype, device)
    before = highest = _anonymous_bytes()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not is_done.wait(0.001):
            highest = max(highest, _anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model = _load(folder, dtype, device)
    time.sleep(0.01)
    is_done.set()
    watcher.join()
    parameters = list(model.parameters())
    return {
        "peak": highest - before,
        "devices": sorted({one.device.type for one in model.parameters()}),
        "dtypes": sorted({str(one.dtype) for one in parameters}),
        "bytes": sum(one.nbytes for one in parameters),
    }


def _load(folder: Path, dtype: str, device: str) -> Any:
    section = ModelSection(model_name_or_path=str(folder))
    source = ModelSource(str(folder), folder.name)
    return load_model(source, section, dtype=getattr(torch, dtype), device=device, attention="sdpa")


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kibibytes = re.search(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)
    assert kibibytes is not None
    return int(kibibytes[1]) * 1024
