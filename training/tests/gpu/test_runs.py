"""Whole runs on GPUs: QLoRA, flash attention, DDP, FSDP and DeepSpeed, memory against the plan.

One command, if you have a GPU: ./training/test.sh tests/gpu
Each test asks for as many GPUs as it needs, and is skipped where there are fewer.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from lora_trainer.model import quantize
from support.extras import needs_deepspeed
from support.gpu_settings import SETTINGS, STEPS
from support.trainer import Trainer, losses, of_kind

GPUS = torch.cuda.device_count()
CAPABILITY = torch.cuda.get_device_capability() if GPUS else (0, 0)
HAS_FLASH = any(importlib.util.find_spec(n) for n in ("flash_attn", "flash_attn_interface"))


def needs(count: int):
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPU(s), {GPUS} can be used")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    one = Trainer(tmp_path_factory.mktemp("gpu"))
    one.settings |= SETTINGS
    return one


def run(trainer: Trainer, name: str, **changed) -> tuple[dict, dict[int, float], dict]:
    """Train; return the plan, the loss of each step, and the last step's event."""
    output = trainer.finish(trainer.root / name, **changed)
    by_step = {step: values.pop() for step, values in losses(output).items()}
    plan = json.loads((output / "plan.json").read_text())
    assert plan["device"] == "cuda"
    return plan, by_step, of_kind(output, "step")[-1]


@pytest.fixture(scope="module")
def plain(trainer):
    return run(trainer, "float32", bf16=False)


@needs(1)
def test_float16_trains_with_a_loss_scale(trainer, plain):
    plan, step_losses, last = run(trainer, "float16", bf16="auto", fp16=True)
    assert plan["precision"] == "float16"
    assert step_losses == pytest.approx(plain[1], rel=5e-2)
    assert last["loss_scale"] >= 1


@needs(1)
def test_the_plan_foresees_the_peak_memory(plain, page):
    plan, _, last = plain
    used, foreseen = last["gpu_memory_bytes"], plan["estimated_memory_bytes"]
    page(f"memory, float32      {used / 1e9:.2f} GB used, {foreseen / 1e9:.2f} GB foreseen")
    # The estimate holds the runtime too, which the allocator does not count.
    assert 0.3 * foreseen < used < 1.2 * foreseen


@needs(1)
@pytest.mark.parametrize("kind", ["use_4bit", "use_8bit"])
def test_qlora_learns_on_a_gpu(trainer, plain, page, kind):
    plan, values, last = run(trainer, kind, optim="adamw_8bit", **{kind: True})
    used, foreseen = last["gpu_memory_bytes"], plan["estimated_memory_bytes"]
    page(f"{kind:<20} loss {values[1]:.3f} to {values[STEPS]:.3f}, {used / 1e9:.2f} GB used")
    assert values[STEPS] < values[1] - 0.3
    assert used < plain[2]["gpu_memory_bytes"]
    assert used < 1.2 * foreseen


@needs(1)
def test_paged_optimizer_takes_the_same_steps(trainer, plain, page):
    _, step_losses, _ = run(trainer, "paged", optim="paged_adamw_32bit", bf16=False)
    page(f"paged_adamw_32bit    last loss {step_losses[STEPS]:.4f}, adamw's {plain[1][STEPS]:.4f}")
    assert step_losses[STEPS] == pytest.approx(plain[1][STEPS], rel=1e-3)


@needs(1)
@pytest.mark.skipif(CAPABILITY < (8, 0), reason="needs compute capability 8.0")
def test_attention_over_variable_lengths_trains_as_an_example_at_a_time(trainer, page):
    plan, step_losses, last = run(trainer, "flash", use_flash_attention=True)
    assert ("flash-attn" if HAS_FLASH else "packed PyTorch") in plan["attention"]
    _, own, slower = run(trainer, "sdpa", use_flash_attention=False)
    page(
        f"{plan['attention']:<20} {last['step_seconds']:.3f} s a step, "
        f"packed sdpa {slower['step_seconds']:.3f} s"
    )
    assert step_losses[1] == pytest.approx(own[1], rel=2e-2)
    assert step_losses[STEPS] == pytest.approx(own[STEPS], rel=0.1)


@needs(2)
@pytest.mark.parametrize(
    "parallelism", ["ddp", "fsdp", pytest.param("deepspeed", marks=needs_deepspeed)]
)
def test_two_gpus_train_what_one_does(trainer, plain, page, parallelism):
    same_step = {"nproc": 2, "gradient_accumulation_steps": 1}
    keys = {"parallelism": parallelism, "bf16": False, **same_step}
    plan, step_losses, last = run(trainer, parallelism, **keys)
    assert (plan["processes"], plan["parallelism"]) == (2, parallelism)
    worst = max(abs(step_losses[step] / plain[1][step] - 1) for step in step_losses)
    page(
        f"{parallelism} on 2 GPUs        {last['step_seconds']:.3f} s a step, one GPU "
        f"{plain[2]['step_seconds']:.3f} s; losses differ by {worst:.1e}"
    )
    assert step_losses[1] == pytest.approx(plain[1][1], rel=1e-4)
    assert step_losses[STEPS] == pytest.approx(plain[1][STEPS], rel=1e-2)


@needs(1)
@needs_deepspeed
def test_layers_in_the_hosts_memory_train_as_those_on_the_gpu(trainer, page):
    _, expected, more = run(trainer, "on the GPU", nproc=1)
    keys = {"parallelism": "deepspeed", "offload_param_device": "cpu", "nproc": 1}
    plan, step_losses, less = run(trainer, "offloaded", **keys)
    page(
        f"offloaded            {less['step_seconds']:.3f} s a step, "
        f"{less['gpu_memory_bytes'] / 2**20:.0f} MB; on the GPU {more['step_seconds']:.3f} s, "
        f"{more['gpu_memory_bytes'] / 2**20:.0f} MB"
    )
    assert plan["parallelism"] == "deepspeed"
    assert less["gpu_memory_bytes"] < more["gpu_memory_bytes"]
    assert step_losses[1] == pytest.approx(expected[1], rel=1e-3)
    assert step_losses[STEPS] == pytest.approx(expected[STEPS], rel=5e-2)


@needs(2)
@pytest.mark.skipif(not quantize.installed_version(), reason="bitsandbytes is not installed")
def test_two_gpus_share_a_base_in_4_bits(trainer, page):
    keys = {"use_4bit": True, "nproc": 2}
    _, whole, more = run(trainer, "ddp-4bit", parallelism="ddp", **keys)
    plan, sharded, less = run(trainer, "fsdp-4bit", parallelism="fsdp", **keys)
    assert (plan["processes"], plan["parallelism"]) == (2, "fsdp")
    page(
        f"fsdp in 4 bits, 2 GPUs {less['step_seconds']:.3f} s a step, "
        f"{less['gpu_memory_bytes'] / 2**20:.0f} MB; ddp {more['step_seconds']:.3f} s, "
        f"{more['gpu_memory_bytes'] / 2**20:.0f} MB"
    )
    assert sharded[1] == pytest.approx(whole[1], rel=1e-3)
    assert sharded[STEPS] == pytest.approx(whole[STEPS], rel=5e-2)
