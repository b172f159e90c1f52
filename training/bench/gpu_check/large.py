"""The 8B-shaped model in the package's own loop: speed, and peak memory against the plan."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_trainer.config.schema import Config
from lora_trainer.data.batches import Sampler
from lora_trainer.machine import peak_memory_bytes, read_machine
from lora_trainer.memory_estimate import DataProfile, ModelSize, loss_chunk
from lora_trainer.model import determinism, probe, quantize
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.backend import Backend, resolve, usable_machine
from lora_trainer.model.compat import enable_checkpointing
from lora_trainer.model.forward import CausalLM
from lora_trainer.plan import make_plan
from lora_trainer.run.events import Event, StepDone
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.dry_run import footprint_of, model_size_of
from lora_trainer.train.loop import TrainingContext, train
from lora_trainer.train.optim import make_optimizer

from . import criteria
from .models import llama_config, make_model
from .record import Figures, Record
from .scale import Scale
from .versions import matrix_tflops

STEPS, WARMUP = 10, 3
# Forward, and backward to the activations alone: the weights are frozen.
FLOPS_A_WEIGHT = 4


@dataclass(frozen=True)
class RandomRows:
    """Examples of `tokens` random tokens, every one of them trained."""

    tokens: int
    vocabulary: int

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        ids = np.random.default_rng(index).integers(3, self.vocabulary, self.tokens)
        return ids, np.ones(self.tokens, dtype=bool)


def lora(record: Record, scale: Scale) -> None:
    """Train LoRA in bfloat16."""
    _measure(record, scale, scale.lora_tokens, use_4bit=False)


def qlora(record: Record, scale: Scale) -> None:
    """Train QLoRA in 4 bits."""
    if not quantize.installed_version():
        record.skip("QLoRA", quantize.NOT_INSTALLED)
        return
    _measure(record, scale, scale.qlora_tokens, use_4bit=True)


def _measure(record: Record, scale: Scale, lengths: Sequence[int], *, use_4bit: bool) -> None:
    kind = "QLoRA" if use_4bit else "LoRA"
    config = Config.model_validate(
        {
            "model": {"use_4bit": use_4bit, "bf16": scale.has_gpu},
            "training": {"per_device_train_batch_size": 1, "max_steps": STEPS},
        }
    )
    with record.attempt(f"{kind}, the model"):
        opened = _open(scale, config)
        for tokens in lengths:
            label = f"{kind}, {tokens} tokens"
            with record.attempt(label):
                _train(record, scale, label, opened, tokens)


@dataclass(frozen=True)
class Opened:
    """A model that is ready to train; `tflops` is the device's rate of matrix products."""

    config: Config
    backend: Backend
    causal: CausalLM
    shape: ModelSize
    tflops: float
    reasons: str


def _open(scale: Scale, config: Config) -> Opened:
    """Do what a session does, with a base model that is on no disk."""
    backend = resolve(config.model, usable_machine(read_machine()), llama_config(scale.large))
    tflops = matrix_tflops(scale, backend.dtype)
    base = make_model(scale.large, config.model, device=backend.device_name, dtype=backend.dtype)
    counted = quantize.count_parameters(base)
    model = add_adapter(base, config.lora, seed=config.training.seed)
    causal = CausalLM(
        model,
        device=backend.device_name,
        padding_free=True,
        chunk=loss_chunk(config.training, scale.large.vocabulary, backend.device),
        precision=backend.precision,
        kernel=backend.kernel,
    )
    reasons = [probe.verify(causal)]
    if causal.packed is None or causal.packed.kernel is None:
        backend = backend.without_kernel()
    if scale.has_gpu:
        reasons.append(determinism.require(lambda: probe.exercise(causal)))
    shape = model_size_of(base, counted, trainable_parameters(model))
    return Opened(config, backend, causal, shape, tflops, "; ".join(filter(None, reasons)))


def _train(record: Record, scale: Scale, label: str, opened: Opened, tokens: int) -> None:
    """Train some steps of one example each."""
    config, causal = opened.config, opened.causal
    rows = RandomRows(tokens, scale.large.vocabulary)
    parameters = trainable_parameters(causal.model)
    footprint = footprint_of(
        config, opened.backend, llama_config(scale.large), is_packed=causal.packed is not None
    )
    plan = make_plan(
        config,
        opened.backend.machine,
        opened.shape,
        DataProfile(len(rows), len(rows) * tokens, len(rows) * tokens, tokens),
        precision=opened.backend.precision,
        attention=opened.backend.packed,
        padding_free=True,
        count=footprint,
    )
    if plan.gradient_checkpointing:
        enable_checkpointing(causal.inner)
    steps: list[StepDone] = []

    def emit(event: Event) -> None:
        print(event.to_line(), end="")
        if isinstance(event, StepDone):
            steps.append(event)

    if scale.has_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        context = TrainingContext(
            causal=causal,
            parameters=parameters,
            optimizer=make_optimizer(parameters, config.training),
            sampler=Sampler(len(rows), plan.step_examples, config.training.seed),
            rows=rows,
            eval_rows=[],
            store=CheckpointStore(Path(folder), keep=1, digest="gpu check"),
            plan=plan,
            training=config.training,
            logging_steps=1,
            emit=emit,
            should_stop=lambda: False,
        )
        train(context, TrainState())
    seconds = statistics.median(step.step_seconds for step in steps[WARMUP:])
    tflops = FLOPS_A_WEIGHT * opened.shape.parameters * tokens / seconds / 1e12
    figures: Figures = {
        "tokens/s": tokens / seconds,
        "TFLOP/s": tflops,
        "of matrix products": f"{tflops / opened.tflops:.0%}",
        "attention": plan.attention,
        "checkpointing": str(plan.gradient_checkpointing).lower(),
    }
    if reasons := "; ".join(filter(None, (opened.reasons, *footprint.faults))):
        figures["but"] = reasons
    record.measure(label, figures)
    judge_peak(record, scale, f"{label}, peak memory", plan.estimated_memory_bytes)


def judge_peak(record: Record, scale: Scale, label: str, planned: int) -> None:
    if not scale.has_gpu:
        record.skip(label, f"a plan of {planned / 1e9:.2f} GB; judged on a GPU alone")
        return
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()  # CUDA's context and libraries
    peak = torch.cuda.max_memory_reserved() + outside
    figures: Figures = {
        "peak GB": peak / 1e9,
        "allocated GB": torch.cuda.max_memory_allocated() / 1e9,
        "outside PyTorch GB": outside / 1e9,
        "plan GB": planned / 1e9,
        "share of plan": peak / planned,
        "host GB": peak_memory_bytes() / 1e9,
    }
    record.judge(label, figures, criteria.peak_as_planned(peak, planned))
