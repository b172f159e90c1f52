"""A rank's view of the processes that train together: its number, and collective operations.

Every rank holds the whole adapter and computes a share of each step's micro-batches; one all-reduce
of a flat bucket sums their gradients. A single process is the same object, whose collectives do
nothing. Small messages use gloo on the CPU, gradients the training device.

On one machine the rendezvous uses a file, so no port is opened; under a launcher, its store
(`rendezvous.py`). The supervisor watches the ranks, so there are no timeouts here: a rank whose
peer is gone raises `PeerLostError`, reports nothing, and is ended or restarted with the group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed.fsdp
from torch import Tensor

from ..machine import Device, Machine
from ..run.events import RankFigures

# A rank waits for another as long as that one lives: tokenizing may take hours.
PATIENCE = datetime.timedelta(days=7)
# What gloo and NCCL say when a peer has gone; what else they raise is a fault of this rank.
LOST_WORDS = (
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
    "gloo::IoException",
    "ncclRemoteError",
    "ncclSystemError",
)


class PeerLostError(Exception):
    """Another rank ended in the middle of something common; that one knows why."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among `count` ranks, of which 0 speaks, saves and exports."""

    rank: int = 0
    count: int = 1
    # Its number among the ranks of its host, and how many those are; None: all are on one.
    here: tuple[int, int] | None = None

    @property
    def local_rank(self) -> int:
        """Return this rank's number among those of its host."""
        return self.here[0] if self.here else self.rank

    @property
    def local_count(self) -> int:
        """Return how many ranks share this host."""
        return self.here[1] if self.here else self.count

    @property
    def is_first(self) -> bool:
        """Return whether this rank speaks and writes for all."""
        return self.rank == 0

    def is_any(self, condition: bool) -> bool:
        """Return whether any rank says so; every rank must ask."""
        if self.count == 1:
            return condition
        return bool(self.summed(torch.tensor([float(condition)])).item())

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Return a question that all ranks answer alike, however late a signal reached one."""
        return lambda: self.is_any(asked())

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, the same bytes on each."""
        if self.count > 1:
            with _peers():
                torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, part: Tensor, whole: Tensor) -> None:
        """Put every rank's part, in the ranks' order, into `whole`."""
        if self.count == 1:
            whole.copy_(part)
            return
        with _peers():
            if whole.device.type == "cpu":  # torch 2.1.2's gloo gathers into a list alone
                torch.distributed.all_gather(list(whole.chunk(self.count)), part)
            else:
                torch.distributed.all_gather_into_tensor(whole, part)

    def least(self, value: int) -> int:
        """Return the least of all ranks' values; every rank must ask."""
        if self.count == 1:
            return value
        values = torch.zeros(self.count, dtype=torch.int64)
        values[self.rank] = value
        return int(self.summed(values).min())

    def of_first(self, values: Sequence[int]) -> list[int]:
        """Return rank 0's values; every rank must ask."""
        own = list(values) if self.is_first else [0] * len(values)
        return [int(value) for value in self.summed(torch.tensor(own)).tolist()]

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.is_any(False)

    @contextlib.contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Let rank 0 do something once, and the others after it (they find its cache)."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let one rank after the other do something that takes much of the machine."""
        for _ in range(self.rank):
            self.wait()
        yield
        for _ in range(self.count - self.rank):
            self.wait()


ALONE = Ranks()


def join(
    rank: int,
    count: int,
    store: Any,
    device: Device = "cpu",
    here: tuple[int, int] | None = None,
    visible_gpus: int = 0,
) -> Ranks:
    """Meet the other ranks, each on a device of its own; return this one's place.

    `store` is one of PyTorch's, or the path of a file on this host. `visible_gpus` is how many
    this process sees.

    Raises:
        PeerLostError: one of them ended before all had come.
    """
    if count == 1:
        return ALONE
    ranks = Ranks(rank, count, here)
    if device == "cuda":
        torch.cuda.set_device(device_of(ranks, visible_gpus))
        if not hasattr(torch.distributed.fsdp, "fully_shard"):
            # Later versions do so by themselves: memory that was gathered into is free again
            # at once, instead of when the processor has caught up with the GPU.
            os.environ.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
    where = {"init_method": f"file://{store}"} if isinstance(store, str) else {"store": store}
    if not isinstance(store, str):
        store.set_timeout(PATIENCE)
    with _peers():
        _meet(ranks, device, **where)
    return ranks


def device_of(ranks: Ranks, visible_gpus: int) -> int:
    """Return the number of this rank's GPU; a launcher may show each process only its own."""
    return ranks.local_rank if visible_gpus >= ranks.local_count else 0


def over_hosts(machine: Machine, ranks: Ranks) -> Machine:
    """Return the hosts of all ranks as one machine, from which the plan computes shares."""
    return replace(
        machine,
        cores=machine.cores * ranks.count // ranks.local_count,
        memory_bytes=machine.memory_bytes * ranks.count // ranks.local_count,
    )


def form_group(ranks: Ranks, device: str) -> None:
    """Make even a rank alone a group of PyTorch's, for a library that wants one."""
    if not torch.distributed.is_initialized():
        _meet(ranks, device, store=torch.distributed.HashStore())  # type: ignore[attr-defined]


def _meet(ranks: Ranks, device: str, **where: Any) -> None:
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.count,
        timeout=PATIENCE,
        **where,
    )


def is_peer_lost(error: BaseException) -> bool:
    """Return whether an error only says that another rank is gone."""
    if isinstance(error, PeerLostError):
        return True
    # Not memory that has run out; torch's own errors of collectives are RuntimeErrors too.
    is_known = isinstance(error, RuntimeError) and not isinstance(
        error, torch.cuda.OutOfMemoryError
    )
    return is_known and any(word in str(error) for word in LOST_WORDS)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        raise PeerLostError(str(error)) from error


def deal_pieces(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Share pieces of these sizes among `count` ranks: as many pieces each, and as even.

    The largest goes first, to whoever has least; every rank computes the same. Within a
    rank the pieces keep their order.
    """
    most = -(-len(sizes) // count)
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for piece in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        open_ranks = [rank for rank in range(count) if len(dealt[rank]) < most]
        rank = min(open_ranks, key=lambda one: (loads[one], one))
        dealt[rank].append(piece)
        loads[rank] += sizes[piece]
    return [sorted(pieces) for pieces in dealt]


def own_batches(tokens: Sequence[int], ranks: Ranks, is_sharded: bool) -> list[tuple[int, float]]:
    """Return this rank's micro-batches of a step, by number, and the weight of each: one.

    Ranks that share a model gather its layers together, so one that has fewer goes through
    the step's first micro-batch again, with weight zero.
    """
    dealt = deal_pieces(tokens, ranks.count)
    own = [(index, 1.0) for index in dealt[ranks.rank]]
    missing = max(map(len, dealt)) - len(own) if is_sharded else 0
    return own + [(0, 0.0)] * missing


def seed_of(seed: int, step: int, index: int) -> int:
    """Return the seed of a micro-batch's dropout: a function of its place in the run alone."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0])


def sum_step(
    ranks: Ranks,
    parameters: Sequence[torch.nn.Parameter],
    loss: Tensor,
    own: RankFigures,
) -> tuple[Tensor, list[RankFigures]]:
    """Make every rank's gradients the sum of all; return the summed loss and all figures.

    The loss stays on its device: to read it is to wait for the device.

    One flat float32 bucket carries the gradients, which of them exist, the loss, and the
    figures of each rank in a place of its own, so that a step costs one collective.
    """
    if ranks.count == 1:
        return loss.detach(), [own]
    gradients = [p.grad for p in parameters]
    exist = [float(gradient is not None) for gradient in gradients]
    figures = [0.0] * (FIGURES * ranks.count)
    figures[FIGURES * ranks.rank : FIGURES * (ranks.rank + 1)] = _packed(own)
    row = torch.tensor([*exist, *figures], dtype=torch.float32, device=loss.device)
    flat = [
        (torch.zeros_like(p) if g is None else g).detach().reshape(-1).float()
        for p, g in zip(parameters, gradients, strict=True)
    ]
    bucket = ranks.summed(torch.cat([*flat, loss.detach().reshape(1).float(), row]))
    sizes = [p.numel() for p in parameters]
    pieces = bucket.split([*sizes, 1, len(exist), len(figures)])
    for parameter, part, has in zip(parameters, pieces, pieces[-2].tolist(), strict=False):
        if has:
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
    rows = pieces[-1].tolist()
    return pieces[-3][0], [
        _unpacked(rank, rows[FIGURES * rank : FIGURES * (rank + 1)]) for rank in range(ranks.count)
    ]


FIGURES = 7


def _packed(own: RankFigures) -> list[float]:
    sizes = [float(own.micro_batch_examples), float(own.micro_batch_tokens)]
    sizes.append(float(own.gradient_checkpointing))
    memory = [own.memory_bytes / 1024, own.gpu_memory_bytes / 1024]
    return [own.seconds, float(own.tokens), *memory, *sizes]


def _unpacked(rank: int, row: list[Any]) -> RankFigures:
    """Return a rank's figures; float32 carries them to seven digits."""
    seconds, tokens, memory_kib, gpu_kib, examples, budget, checkpointing = row
    return RankFigures(
        rank=rank,
        seconds=seconds,
        tokens=int(tokens),
        memory_bytes=int(memory_kib) * 1024,
        gpu_memory_bytes=int(gpu_kib) * 1024,
        micro_batch_examples=int(examples),
        micro_batch_tokens=int(budget),
        gradient_checkpointing=int(checkpointing),
    )
