"""Host memory while a model of several shards is loaded to the device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from lora_trainer.config.schema import ModelSection
from lora_trainer.model import load

from . import criteria
from .models import write_folder
from .record import Figures, Record
from .scale import Scale
from .versions import wait

STATUS = Path("/proc/self/status")
SECONDS_BETWEEN = 0.001


class HostMemory:
    """Samples this process's anonymous memory, in bytes, until it is left."""

    def __enter__(self) -> HostMemory:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc: give back what is free
            ctypes.CDLL(None).malloc_trim(0)
        self.before = self.peak = anonymous_bytes()
        self._is_over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._sampler.join()

    @property
    def growth(self) -> int:
        """Return the largest growth seen."""
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the resident memory that no file backs."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def run(record: Record, scale: Scale) -> None:
    """Load a model of several files, and compare the growth of host memory with one file."""
    dtype = torch.bfloat16 if scale.has_gpu else torch.float32
    with tempfile.TemporaryDirectory() as folder, record.attempt("several shards"):
        path = write_folder(
            Path(folder) / "model",
            scale.sharded,
            device=scale.device,
            dtype=dtype,
            shard_bytes=scale.shard_bytes,
        )
        sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
        section = ModelSection(model_name_or_path=str(path))
        source = load.locate(section)
        device = "cuda:0" if scale.has_gpu else "cpu"

        def load_model() -> Any:
            model = load.load_model(source, section, dtype=dtype, device=device, attention="sdpa")
            wait(scale)
            return model

        load_model()  # what transformers imports at its first time is no weight
        torch.cuda.empty_cache()
        start = time.perf_counter()
        with HostMemory() as memory:
            model = load_model()
        figures: Figures = {
            "shards": len(sizes),
            "model MB": sum(sizes) / 1e6,
            "largest shard MB": max(sizes) / 1e6,
            "host memory MB": memory.growth / 1e6,
            "s": time.perf_counter() - start,
        }
        devices = {parameter.device.type for parameter in model.parameters()}
        if devices != {scale.device}:
            raise RuntimeError(f"weights are on {', '.join(sorted(devices))}")
        if scale.has_gpu:
            verdict = criteria.within_one_shard(memory.growth, max(sizes))
            record.judge("several shards", figures, verdict)
        else:
            record.measure("several shards", figures)
