"""Work done by several processes that train together, without importing torch again in each.

The fork server imports it once; `together` forks the ranks from there, which takes a
fraction of a second each.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lora_trainer.model.ranks import join

SECONDS = 240.0
_context = multiprocessing.get_context("forkserver")


def together(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(ranks, *arguments)` gave in each of `count` processes.

    `work` is a function of a module; what it returns must be plain data and tensors.
    """
    folder.mkdir(parents=True)
    _context.set_forkserver_preload([work.__module__])
    # Python 3.11's fork server looks for what it preloads on its own path alone.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    processes = [
        _context.Process(target=_one, args=(rank, count, folder, work, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _one(
    rank: int, count: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    ranks = join(rank, count, str(folder / "store"))
    torch.save(work(ranks, *arguments), folder / f"{rank}.pt")
