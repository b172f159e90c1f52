"""The sections in their order, and how one runs: in a process of its own, with a time limit.

A hang, an out-of-memory error or a CUDA fault in one section does not affect the others. On a GPU
each process starts afresh, since CUDA does not survive a fork; `--quick` forks, so that torch
and transformers are imported once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import Record, write_json
from .scale import Scale


@dataclass(frozen=True, slots=True)
class Section:
    """Its time limit in seconds on one H100, and the function that runs it."""

    limit: int
    module: str
    function: str = "run"


# The limits' sum is under the 480 s of the whole check.
SECTIONS: Mapping[str, Section] = {
    "versions": Section(20, "versions"),
    "precision": Section(100, "precision"),
    "attention": Section(65, "attention"),
    "resume": Section(100, "resume"),
    "synchronizations": Section(50, "synchronizations"),
    "lora_8b": Section(50, "large", "lora"),
    "qlora_8b": Section(65, "large", "qlora"),
    "loading": Section(28, "loading"),
}
ORPHAN_SECONDS = 1.0
# What the sections import.
PRELOADED = ("transformers.models.llama.modeling_llama", "peft", "lora_trainer.train.session")


def preload() -> None:
    """Import what forked sections need."""
    for name in PRELOADED:
        importlib.import_module(name)


def run_section(name: str, folder: Path, scale: Scale) -> str:
    """Run one section to its end or its time limit; return how it ended."""
    path = folder / f"{name}.json"
    context = multiprocessing.get_context("spawn" if scale.has_gpu else "fork")
    process = context.Process(target=_in_child, args=(name, str(path), scale, os.getpid()))
    start = time.monotonic()
    process.start()
    try:
        limit = SECTIONS[name].limit * scale.patience
        process.join(limit)
        ended = _ended(process.exitcode, limit)
    finally:
        # The section's own processes too, such as a training run.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
    _close(path, name, ended, time.monotonic() - start)
    return ended


def _ended(exit_code: int | None, limit_seconds: int) -> str:
    if exit_code == 0:
        return "finished"
    if exit_code is None:
        return f"stopped at its limit of {limit_seconds} s"
    return f"ended with {exit_code}, see its log"


def _close(path: Path, name: str, ended: str, seconds: float) -> None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"section": name, "rows": []}
    write_json(path, content | {"ended": ended, "seconds": round(seconds, 1)})


def _in_child(name: str, path: str, scale: Scale, parent: int) -> None:
    os.setsid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    log = Path(path).with_suffix(".log").open("w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    section = SECTIONS[name]
    module = importlib.import_module(f"{__package__}.{section.module}")
    getattr(module, section.function)(Record(Path(path), name), scale)


def _end_with(parent: int) -> None:
    """End this section where the command that started it was killed."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os.killpg(0, signal.SIGKILL)
