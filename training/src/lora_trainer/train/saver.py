"""Save checkpoints in the background: a step waits only while they are copied.

At a step boundary the loop's state is copied to host memory, into buffers that are used again for
the next checkpoint. A thread then hashes, writes, verifies and renames it as `CheckpointStore.save`
does, so a kill at any instant leaves a whole checkpoint or none. One checkpoint is saved at a time.
An error of the thread is raised at the next step boundary, at the latest when the training ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from ..run.events import CheckpointSaved, Event, PhaseChanged, Warned
from .checkpoint import Named, Snapshot, TrainState, take_snapshot
from .checkpoint_store import CheckpointStore

# Tensors begin at multiples of this in their buffer; a vector register's bytes.
ALIGNMENT = 64


class HostBuffer:
    """Host memory for copies of tensors, kept from one checkpoint to the next.

    For tensors on a GPU it is pinned, so that the copies run while the host goes on.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[tuple[str, str], torch.dtype, torch.Size]] = []
        self._views: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def copy(self, tensors: Named) -> Named:
        """Return copies of tensors, complete after `wait`; the next call overwrites them."""
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        is_on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if layout != self._layout:
            self._layout, self._views = layout, []  # frees the old one first
            self._views = _allocate(list(tensors.values()), is_pinned=is_on_gpu)
        torch._foreach_copy_(self._views, list(tensors.values()), non_blocking=True)
        if is_on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(zip(tensors, self._views, strict=True))

    def wait(self) -> None:
        """Wait until the last copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()


def _allocate(tensors: Sequence[Tensor], *, is_pinned: bool) -> list[Tensor]:
    """Return uninitialized host tensors like these, all in one allocation."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    spans = [math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes]
    try:
        memory = torch.empty(sum(spans), dtype=torch.uint8, pin_memory=is_pinned)
    except RuntimeError:  # the system limits how much memory may be pinned
        memory = torch.empty(sum(spans), dtype=torch.uint8)
    return [
        part[:size].view(tensor.dtype).view(tensor.shape)
        for part, size, tensor in zip(memory.split(spans), sizes, tensors, strict=True)
    ]


class Saver:
    """Saves checkpoints of a training loop, in a thread of its own."""

    def __init__(self, store: CheckpointStore, emit: Callable[[Event], None]) -> None:
        self._store = store
        self._emit = emit
        self._buffer = HostBuffer()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        # Whoever reads checkpoints meanwhile reads this one, too.
        store.before_reading = self.wait

    def __enter__(self) -> Saver:
        """Return the saver itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Wait for the last checkpoint; its error is a warning if another one ends the training."""
        self._executor.shutdown(wait=True)
        self._store.before_reading = lambda: None
        if kind is None:
            self.wait()
        elif self._saving is not None and (error := self._saving.exception()) is not None:
            self._emit(Warned(message=f"the last checkpoint could not be saved: {error}"))

    def save(
        self,
        state: TrainState,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        figures: Callable[[], Sequence[str]],
        *,
        is_last: bool,
    ) -> None:
        """Copy a checkpoint and save it in the background; wait for it if it is the last one.

        `figures` is called in the background. An earlier checkpoint is waited for first.

        Raises:
            OSError: the earlier checkpoint, or the last one, could not be written.
        """
        start = time.monotonic()
        self._emit(PhaseChanged(phase="saving", detail=f"step {state.step}"))
        self.wait()
        snapshot = take_snapshot(state, parameters, optimizer, parameters, copy=self._buffer.copy)
        waited = time.monotonic() - start
        self._saving = self._executor.submit(self._write, snapshot, figures, start, waited)
        if is_last:
            self.wait()
        self._emit(PhaseChanged(phase="training"))

    def check(self) -> None:
        """Raise the error of a checkpoint that failed; never waits."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being saved, and raise its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(
        self,
        snapshot: Snapshot,
        figures: Callable[[], Sequence[str]],
        start: float,
        waited: float,
    ) -> None:
        self._buffer.wait()
        path = self._store.save(replace(snapshot, digest=self._store.digest, figures=figures()))
        for aside in self._store.set_aside:
            what = f"{path.name} was not a checkpoint of this run and was renamed to {aside}"
            self._emit(Warned(message=what))
        state = snapshot.state
        self._emit(
            CheckpointSaved(
                step=state.step,
                path=f"checkpoints/{path.name}",
                bytes=sum(file.stat().st_size for file in path.iterdir()),
                seconds=time.monotonic() - start,
                wait_seconds=waited,
                is_best=state.best_step == state.step,
            )
        )
