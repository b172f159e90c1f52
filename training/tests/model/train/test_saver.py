"""A checkpoint is saved in the background: steps go on, and its guarantees stay."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lora_trainer.checkpoint_folder import FILES, MANIFEST
from lora_trainer.run.events import CheckpointSaved, StepDone, Warned
from lora_trainer.train import checkpoint_store, loop
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.saver import HostBuffer, Saver
from lora_trainer.train.tensor_file import serialized
from support.snapshots import DIGEST, steps_of
from support.training_loop import make_context, of_kind

FIRST = "adapter.safetensors"
WAIT_SECONDS = 60.0  # no test waits so long unless it fails


class Gate:
    """Holds the saving thread before a checkpoint's first file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.error: Exception | None = None
        write = checkpoint_store._write_file

        def gated(path: Path, data: Any) -> Any:
            if path.name == FIRST:
                self.reached.set()
                assert self.opened.wait(WAIT_SECONDS)
                if self.error is not None:
                    raise self.error
            return write(path, data)

        monkeypatch.setattr(checkpoint_store, "_write_file", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def train_gated(tmp_path: Path, gate: Gate, *, open_after: int) -> list[Any]:
    """Train six steps that save at the fourth; open the gate after some step; return events."""
    context, events = make_context(tmp_path, save_steps=4, max_steps=6)

    def emit(event: Any) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == open_after:
            assert gate.reached.wait(WAIT_SECONDS)
            gate.opened.set()

    loop.train(replace(context, emit=emit), TrainState())
    return events


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, gate: Gate) -> None:
    events = train_gated(tmp_path, gate, open_after=5)
    order = [
        (type(event), event.step)
        for event in events
        if isinstance(event, StepDone | CheckpointSaved)
    ]
    assert order.index((CheckpointSaved, 4)) > order.index((StepDone, 5))
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [4, 6]


def test_second_checkpoint_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    store = CheckpointStore(tmp_path, keep=2, digest=DIGEST)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = _stepped(weight)
    events: list[Any] = []
    with Saver(store, events.append) as saver:
        for step in (1, 2):
            threading.Timer(0.05, gate.opened.set).start()
            saver.save(TrainState(step=step), {"w": weight}, optimizer, tuple, is_last=False)
            weight.data.fill_(7.0)
    first, second = (store.read(store.path_of(step)).adapter["w"] for step in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(second, torch.full((2,), 7.0))


def test_checkpoint_holds_its_own_step_although_later_ones_were_taken(
    tmp_path: Path, gate: Gate
) -> None:
    train_gated(tmp_path / "background", gate, open_after=5)
    steps: list[int] = []
    context, _ = make_context(
        tmp_path / "stopped", max_steps=6, should_stop=lambda: steps[-1:] == [4]
    )

    def emit(event: Any) -> None:
        steps.extend([event.step] if isinstance(event, StepDone) else [])

    loop.train(replace(context, emit=emit), TrainState())
    for name in ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors"):
        one, other = (
            (tmp_path / run / "step-000004" / name).read_bytes()
            for run in ("background", "stopped")
        )
        assert one == other


def test_error_of_a_background_save_ends_the_run_at_a_boundary(tmp_path: Path, gate: Gate) -> None:
    gate.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        train_gated(tmp_path, gate, open_after=5)
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_training_waits_for_the_checkpoint_that_is_being_saved(
    tmp_path: Path, gate: Gate
) -> None:
    context, events = make_context(tmp_path, save_steps=2, max_steps=6)

    def emit(event: Any) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            assert gate.reached.wait(WAIT_SECONDS)
            threading.Timer(0.05, gate.opened.set).start()
            raise RuntimeError("a fault of the third step")

    with pytest.raises(RuntimeError, match="third step"):
        loop.train(replace(context, emit=emit), TrainState())
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [2]
    assert steps_of(context.store) == [2]


def test_checkpoint_that_fails_beside_the_training_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, digest=DIGEST)
    weight = torch.nn.Parameter(torch.ones(2))
    events: list[Any] = []
    with pytest.raises(RuntimeError, match="of the training"), Saver(store, events.append) as saver:
        saver.save(TrainState(step=1), {"w": weight}, _stepped(weight), tuple, is_last=False)
        raise RuntimeError("a fault of the training")
    assert ["could not be saved" in one.message for one in of_kind(events, Warned)] == [True]


def test_readers_wait_for_the_checkpoint_that_is_being_saved(tmp_path: Path, gate: Gate) -> None:
    store = CheckpointStore(tmp_path, keep=2, digest=DIGEST)
    weight = torch.nn.Parameter(torch.ones(2))
    with Saver(store, lambda _: None) as saver:
        saver.save(TrainState(step=1), {"w": weight}, _stepped(weight), tuple, is_last=False)
        threading.Timer(0.05, gate.opened.set).start()
        newest, skipped = store.newest()
    assert newest is not None
    assert (newest.state.step, skipped) == (1, [])


def _stepped(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    return optimizer


def test_copies_are_made_in_the_same_memory_each_time() -> None:
    buffer = HostBuffer()
    tensors = {
        ("adapter", "a"): torch.arange(6.0).view(2, 3).T,
        ("optimizer", "a.step"): torch.tensor(3.0),
        ("optimizer", "a.code"): torch.tensor([1, 255], dtype=torch.uint8),
    }
    first = buffer.copy(tensors)
    again = buffer.copy({name: tensor.clone() for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
        assert again[name].is_contiguous()
        assert again[name].data_ptr() == first[name].data_ptr()
        assert again[name].data_ptr() != tensor.data_ptr()


def test_buffer_takes_tensors_of_another_layout() -> None:
    buffer = HostBuffer()
    buffer.copy({("adapter", "a"): torch.ones(2)})
    copies = buffer.copy({("adapter", "a"): torch.ones(5, dtype=torch.bfloat16)})
    assert torch.equal(copies["adapter", "a"], torch.ones(5, dtype=torch.bfloat16))


def test_tensor_files_are_byte_for_byte_those_of_the_library() -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(7),
        "ä.half": torch.randn(4).to(torch.bfloat16),
        "a.step": torch.tensor(3.0),
        "a.count": torch.tensor(5),
        "a.code": torch.arange(9, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }
    written = b"".join(bytes(block) for block in serialized(tensors))
    assert written == safetensors.torch.save(tensors)


def test_write_makes_no_copy_of_the_tensors() -> None:
    tensor = torch.zeros(1000)
    _, data = serialized({"w": tensor})
    tensor += 1
    assert bytes(data) == bytes(tensor.numpy().data)


def test_saving_thread_syncs_every_file_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace_path = os.fsync, Path.replace

    def logged_sync(descriptor: int) -> None:
        calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def logged_rename(path: Path, target: Path) -> Path:
        calls.append(("rename", target.name))
        return replace_path(path, target)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(Path, "replace", logged_rename)
    context, _ = make_context(tmp_path, max_steps=1)
    loop.train(context, TrainState())
    rename = calls.index(("rename", "step-000001"))
    assert [name for _, name in calls[:rename]] == [*FILES, MANIFEST, ".writing-step-000001"]
    assert calls[rename + 1] == ("sync", tmp_path.name)
