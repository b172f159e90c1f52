"""The plan resolves every number, and the machine's facts respect its limits."""

from __future__ import annotations

import pytest

from lora_trainer.config import Config
from lora_trainer.machine import (
    UNLIMITED_BYTES,
    Gpu,
    Machine,
    cgroup_memory_limit_bytes,
    free_disk_bytes,
    peak_memory_bytes,
    read_machine,
)
from lora_trainer.plan import DataProfile, ModelShape, make_plan

SHAPE = ModelShape("llama", 30, 576, 1536, 49152, 134_515_008, 4_884_480, 8192)
MACHINE = Machine(cores=2, memory_bytes=24 << 30, gpus=())


def plan_of(machine=MACHINE, data=None, **sections):
    return make_plan(
        Config.model_validate(sections),
        machine,
        SHAPE,
        data or DataProfile(101, 5000, 1000, 50, eval_rows=8),
        precision="float32",
        attention="packed",
        padding_free=True,
    )


def test_steps_follow_from_rows_batches_and_epochs():
    training = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.5,
        "warmup_ratio": 0.1,
    }
    plan = plan_of(training=training)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (13, 33, 4)


def test_max_steps_overrides_epochs_and_warmup_steps_the_ratio():
    plan = plan_of(training={"max_steps": 7, "warmup_steps": 100})
    assert (plan.total_steps, plan.warmup_steps) == (7, 7)


def test_evaluation_needs_held_out_rows():
    data = DataProfile(101, 5000, 1000, 50, eval_rows=0)
    assert plan_of(data=data, training={"eval_steps": 5}).eval_every_steps == 0


def test_checkpointing_goes_on_by_itself_when_memory_is_short():
    data = DataProfile(101, 500_000, 1000, 8192)
    short = Machine(cores=2, memory_bytes=8 << 30, gpus=())
    plan = plan_of(machine=short, data=data)
    assert plan.gradient_checkpointing
    assert "gradient checkpointing is on" in plan.reasons[0]
    assert not plan_of(machine=MACHINE).gradient_checkpointing


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        plan_of(data=DataProfile(0, 0, 0, 0))


def test_a_gpu_decides_device_and_memory():
    gpu = Gpu(0, "H200", 139 << 30, (9, 0))
    plan = plan_of(machine=Machine(cores=16, memory_bytes=1 << 37, gpus=(gpu,)))
    assert (plan.device, plan.memory_limit_bytes) == ("cuda", 139 << 30)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("memory.max", "max", UNLIMITED_BYTES),
        ("memory.max", "1073741824", 1 << 30),
        ("memory/memory.limit_in_bytes", "9223372036854771712", UNLIMITED_BYTES),
        ("memory/memory.limit_in_bytes", "2147483648", 2 << 30),
    ],
)
def test_the_cgroups_memory_limit_is_read_in_both_versions(tmp_path, name, text, expected):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    assert cgroup_memory_limit_bytes(tmp_path) == expected


def test_this_machine_is_read():
    machine = read_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 28
    assert peak_memory_bytes() > 1 << 20


def test_free_disk_is_told_for_a_folder_that_is_not_there_yet(tmp_path):
    assert free_disk_bytes(tmp_path / "a" / "b") > 0
