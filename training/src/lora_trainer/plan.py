"""Every number of a run, resolved: (Config, Machine, ModelShape, DataProfile) -> Plan. Pure.

Nothing is derived later: the loop reads the plan, the report prints it, `plan.json`
keeps it. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .config import Config
from .machine import Machine

Precision = Literal["float32", "bfloat16"]
# What a process holds before any model: the interpreter, torch, transformers, peft
# (487 MB measured on the CPU; CUDA's context comes on top on a GPU).
RUNTIME_BYTES = 500 << 20


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the plan needs to know of the base model; parameters are counts, not bytes."""

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    trainable_parameters: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class DataProfile:
    """What the plan needs to know of the prepared data; lengths in tokens."""

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    eval_rows: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The resolved run. `reasons` says, for each choice that was automatic, why."""

    device: Literal["cpu", "cuda"]
    processes: int
    threads: int
    precision: Precision
    attention: str
    padding_free: bool
    gradient_checkpointing: bool
    rows: int
    micro_batch_examples: int
    micro_batches: int
    step_examples: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float
    eval_rows: int
    eval_every_steps: int
    save_every_steps: int
    loss_chunk_tokens: int
    parameters: int
    trainable_parameters: int
    estimated_memory_bytes: int
    memory_limit_bytes: int
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return asdict(self) | {"reasons": list(self.reasons)}


def make_plan(
    config: Config,
    machine: Machine,
    shape: ModelShape,
    data: DataProfile,
    *,
    precision: Precision,
    attention: str,
    padding_free: bool,
    reasons: tuple[str, ...] = (),
) -> Plan:
    """Resolve a run's numbers; `precision` and `attention` are measured by the caller.

    Raises:
        ValueError: there is nothing to train (no row); the data check refuses that first.
    """
    if data.rows < 1:
        raise ValueError("no rows to train on")
    training = config.training
    step_examples = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps_per_epoch = math.ceil(data.rows / step_examples)
    total = (
        training.max_steps
        if training.max_steps > 0
        else max(1, math.ceil(training.num_train_epochs * steps_per_epoch))
    )
    warmup = (
        training.warmup_steps
        if training.warmup_steps is not None
        else math.ceil(training.warmup_ratio * total)
    )
    checkpointing, why = _choose_checkpointing(config, machine, shape, data, precision)
    return Plan(
        device="cuda" if machine.has_gpu else "cpu",
        processes=1,
        threads=machine.cores,
        precision=precision,
        attention=attention,
        padding_free=padding_free,
        gradient_checkpointing=checkpointing,
        rows=data.rows,
        micro_batch_examples=training.per_device_train_batch_size,
        micro_batches=training.gradient_accumulation_steps,
        step_examples=step_examples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=min(warmup, total),
        peak_learning_rate=training.learning_rate,
        eval_rows=data.eval_rows,
        eval_every_steps=training.eval_steps if data.eval_rows else 0,
        save_every_steps=config.output.save_steps,
        loss_chunk_tokens=training.loss_chunk_tokens,
        parameters=shape.parameters,
        trainable_parameters=shape.trainable_parameters,
        estimated_memory_bytes=estimate_memory_bytes(
            config, shape, data, precision, has_checkpointing=checkpointing
        ),
        memory_limit_bytes=_memory_limit_bytes(machine),
        reasons=(*reasons, *why),
    )


def estimate_memory_bytes(
    config: Config,
    shape: ModelShape,
    data: DataProfile,
    precision: Precision,
    *,
    has_checkpointing: bool,
) -> int:
    """Estimate a step's peak memory in bytes: weights, adapter states, activations, logits.

    Counted for the worst micro-batch, all of whose examples are the longest one. A
    transformer layer keeps about 10 hidden-wide and 4 intermediate-wide tensors for
    its backward pass (norm inputs, q, k, v, attention output, residuals; gate, up,
    activation, product); with gradient checkpointing one hidden-wide tensor a layer
    and one layer's full set.
    """
    width = 4 if precision == "float32" else 2
    tokens = config.training.per_device_train_batch_size * data.longest
    weights = shape.parameters * _weight_bytes(config, width)
    # float32 master copy, gradient and AdamW's two moments.
    adapter = shape.trainable_parameters * 16
    layer = tokens * (10 * shape.hidden_size + 4 * shape.intermediate_size) * width
    layers = (
        layer + shape.layers * tokens * shape.hidden_size * width
        if has_checkpointing
        else layer * shape.layers
    )
    # logits, their float32 softmax and its gradient, one chunk at a time; an evaluation's
    # batch is often the larger one.
    scored = config.training.per_device_eval_batch_size * data.longest if data.eval_rows else 0
    chunk = min(max(tokens, scored), config.training.loss_chunk_tokens)
    logits = chunk * shape.vocab_size * 12
    return int(RUNTIME_BYTES + weights + adapter + layers + logits)


def _weight_bytes(config: Config, width: int) -> float:
    if config.model.use_4bit:
        return 0.56  # 4 bits and the double-quantized constants
    return 1.03 if config.model.use_8bit else width


def _memory_limit_bytes(machine: Machine) -> int:
    return machine.gpus[0].memory_bytes if machine.has_gpu else machine.memory_bytes


def _choose_checkpointing(
    config: Config, machine: Machine, shape: ModelShape, data: DataProfile, precision: Precision
) -> tuple[bool, tuple[str, ...]]:
    asked = config.model.gradient_checkpointing
    if asked != "auto":
        return bool(asked), ()
    needed = estimate_memory_bytes(config, shape, data, precision, has_checkpointing=False)
    limit = _memory_limit_bytes(machine)
    if needed <= 0.8 * limit:
        return False, ()
    return True, (
        f"gradient checkpointing is on: without it a step may need {needed / 2**30:.1f} GB "
        f"of {limit / 2**30:.1f} GB",
    )
