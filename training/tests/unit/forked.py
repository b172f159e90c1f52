"""Work done by several processes that train together, without importing torch in each anew.

The fork server imports it once; `together` forks the ranks from there, which takes a
fraction of a second each.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_trainer.ranks import Ranks, join

SECONDS = 120.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["ranks_at_work"])


def together(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(ranks, *arguments)` gave in each of `count` processes.

    `work` is a function of a module; what it returns must be plain data and tensors.
    """
    folder.mkdir(parents=True)
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
    ranks: Ranks = join(rank, count, str(folder / "store"))
    torch.save(work(ranks, *arguments), folder / f"{rank}.pt")
