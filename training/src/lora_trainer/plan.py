"""Every number of a run, resolved: (Config, Machine, ModelShape, DataProfile) -> Plan. Pure.

Only the rate of each step is computed later, by `learning_rate` from the plan's peak: the loop
reads the plan, the report prints it, `plan.json` stores it. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .config.schema import Config, TrainingSection
from .errors import ConfigError
from .machine import Device, Machine
from .memory_estimate import (
    RUNTIME_BYTES,
    UNDIVIDED,
    Count,
    DataProfile,
    ModelSize,
    Parallelism,
    Partition,
    Precision,
    estimate_memory_bytes,
    loss_chunk,
    memory_limit_bytes,
    uncounted,
    weights_bytes,
)
from .run.memory_limits import MemoryLimits
from .run.smaller_sizes import batch_text
from .units import size

# A base model that takes more of a device leaves too little memory for training.
FITTING_FRACTION = 0.9
AS_CONFIGURED = MemoryLimits()


@dataclass(frozen=True, slots=True)
class Plan:
    """The resolved run. `reasons` explains each automatic choice."""

    device: Device
    processes: int
    parallelism: Parallelism
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
    eval_batch_examples: int
    eval_every_steps: int
    save_every_steps: int
    loss_chunk_tokens: int
    parameters: int
    trainable_parameters: int
    estimated_memory_bytes: int
    memory_limit_bytes: int
    # For one example with gradient checkpointing; and what fits if that does not (`smaller`).
    least_memory_bytes: int = 0
    smaller_plans: tuple[str, ...] = ()
    fused: str = ""  # which layers are fused; known once the model is loaded
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        lists = {"reasons": list(self.reasons), "smaller_plans": list(self.smaller_plans)}
        return asdict(self) | lists | {"batch": batch_text(asdict(self))}


def make_plan(
    config: Config,
    machine: Machine,
    model_size: ModelSize,
    data: DataProfile,
    *,
    precision: Precision,
    attention: str,
    padding_free: bool,
    processes: int = 1,
    parallelism: Parallelism = "none",
    limits: MemoryLimits = AS_CONFIGURED,
    step_examples: int = 0,
    reasons: tuple[str, ...] = (),
    count: Count = uncounted,
) -> Plan:
    """Resolve a run's numbers; `machine`, `precision` and `attention` come from the backend.

    `limits` are the reduced sizes after the run was out of memory. `step_examples` are those of
    the run that continues, with whatever number of processes it began; 0: it begins now.

    Raises:
        ValueError: there are no rows; the data check rejects that first.
    """
    if data.rows < 1:
        raise ValueError("no rows to train on")
    training = config.training
    begun_with, step_examples = step_examples, step_examples or fresh_step(training, processes)
    steps_per_epoch = math.ceil(data.rows / step_examples)
    total, warmup = steps_of(training, steps_per_epoch)
    # With fewer micro-batches than processes, micro-batches become smaller.
    as_asked = min(training.per_device_train_batch_size, -(-step_examples // processes))
    micro_batch = min(as_asked, limits.micro_batch_examples or as_asked)
    micro_batches = -(-math.ceil(step_examples / micro_batch) // processes)
    eval_batch = training.per_device_eval_batch_size
    eval_batch = min(eval_batch, limits.eval_batch_examples or eval_batch)
    # Without a GPU the layers are in host memory anyway.
    is_offloaded = config.training.offload_param_device == "cpu" and machine.has_gpu
    partition = Partition(
        processes,
        parallelism,
        micro_batch,
        is_offloaded,
        eval_batch,
        accumulates=micro_batches > 1,
        is_on_gpu=machine.has_gpu,
    )
    chosen = _choose_checkpointing(
        config, machine, model_size, data, precision, partition, limits, count
    )
    checkpointing, why = chosen
    return Plan(
        device=machine.device,
        processes=processes,
        parallelism=parallelism,
        threads=max(1, machine.cores // processes),
        precision=precision,
        attention=attention,
        padding_free=padding_free,
        gradient_checkpointing=checkpointing,
        rows=data.rows,
        micro_batch_examples=micro_batch,
        micro_batches=micro_batches,
        step_examples=step_examples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        peak_learning_rate=training.learning_rate,
        eval_rows=data.eval_rows,
        eval_batch_examples=eval_batch,
        eval_every_steps=_every(training.eval_steps, training.evals_per_epoch, steps_per_epoch)
        if data.eval_rows
        else 0,
        save_every_steps=_every(
            config.output.save_steps, config.output.saves_per_epoch, steps_per_epoch
        ),
        loss_chunk_tokens=loss_chunk(training, model_size.vocab_size, machine.device),
        parameters=model_size.parameters,
        trainable_parameters=model_size.trainable_parameters,
        estimated_memory_bytes=estimate_memory_bytes(
            config,
            model_size,
            data,
            precision,
            has_checkpointing=checkpointing,
            partition=partition,
            count=count,
        ),
        memory_limit_bytes=memory_limit_bytes(machine, processes),
        reasons=(
            *reasons,
            *why,
            *_kept_step(training, begun_with, processes),
            *_idle_reasons(training, step_examples, processes),
            *limits.reasons(as_asked, training.per_device_eval_batch_size),
        ),
    )


def steps_of(training: TrainingSection, steps_per_epoch: int) -> tuple[int, int]:
    """Return the number of steps and of warmup steps."""
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
    return total, min(warmup, total)


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    kind: Literal["linear", "cosine", "constant"],
) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    warmup: peak * step / warmup; then with p the share done of the rest:
    linear peak * (1 - p), cosine peak * (1 + cos(pi p)) / 2, constant peak.
    Source: the schedules of transformers.get_scheduler, compared in a test.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if kind == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def _every(steps: int, per_epoch: int, steps_per_epoch: int) -> int:
    """Return the interval in steps; `per_epoch` takes priority."""
    return math.ceil(steps_per_epoch / per_epoch) if per_epoch else steps


def limited(plan: Plan, limits: MemoryLimits) -> Plan:
    """Return the plan of a run that continues with smaller batches."""
    batches = math.ceil(plan.step_examples / limits.micro_batch_examples)
    return replace(
        plan,
        micro_batch_examples=limits.micro_batch_examples,
        micro_batches=-(-batches // plan.processes),
        eval_batch_examples=limits.eval_batch_examples,
        gradient_checkpointing=limits.gradient_checkpointing,
    )


def choose_parallelism(
    config: Config, machine: Machine, model_size: ModelSize, precision: Precision, processes: int
) -> tuple[Parallelism, str]:
    """Return the parallelism, and the reason if it was chosen automatically."""
    asked = config.training.parallelism
    if processes == 1 and asked != "deepspeed":
        return "none", ""
    if processes == 1 and config.training.offload_param_device == "none":
        return (
            "none",
            "deepspeed is not used: with one process there is nothing to shard, and nothing is "
            "offloaded",
        )
    needed = RUNTIME_BYTES + weights_bytes(config, model_size, precision, UNDIVIDED)
    limit = memory_limit_bytes(machine, processes)
    if asked == "deepspeed":
        return asked, _reading_reason(needed * processes, machine)
    if asked != "auto":
        return asked, ""
    if needed <= FITTING_FRACTION * limit:
        return "ddp", ""
    return "fsdp", (
        f"parallelism is fsdp: the base model needs {size(needed)} per process, and each "
        f"has {size(limit)}"
    )


def _reading_reason(needed: float, machine: Machine) -> str:
    if needed <= machine.memory_bytes:
        return ""
    return (
        f"with deepspeed all processes load the base model at the same time: {size(needed)} "
        f"are needed, and the machine has {size(machine.memory_bytes)}; with fsdp "
        "they load one after another"
    )


def process_count(config: Config, machine: Machine) -> int:
    """Return how many processes train: one per visible GPU unless `nproc` is set.

    Raises:
        ConfigError: `nproc` is more than the number of GPUs.
    """
    asked, gpus = config.training.nproc, len(machine.gpus)
    if asked == "auto":
        return max(1, gpus)
    if 0 < gpus < asked:
        raise ConfigError.of(
            f"nproc {asked} is more than the visible GPUs",
            where="training.nproc",
            why=f"each process needs its own GPU, and there {'is' if gpus == 1 else 'are'} {gpus}",
            remedy=f"--nproc {gpus}, or --nproc auto",
        )
    return asked


def fresh_step(training: TrainingSection, processes: int) -> int:
    """Return the examples of a step of a run that begins with that many processes."""
    accumulated = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return training.train_batch_size or accumulated * processes


def _kept_step(training: TrainingSection, examples: int, processes: int) -> tuple[str, ...]:
    if examples in (0, fresh_step(training, processes)):
        return ()
    count = "1 process" if processes == 1 else f"{processes} processes"
    return (
        f"a step keeps the {examples} examples that this run began with; a new run with {count} "
        f"would have {fresh_step(training, processes)}",
    )


def _idle_reasons(training: TrainingSection, step_examples: int, processes: int) -> tuple[str, ...]:
    asked = training.per_device_train_batch_size
    if processes <= math.ceil(step_examples / asked):
        return ()
    if step_examples < processes:
        return (
            f"{processes - step_examples} of {processes} processes have nothing to do: a step "
            f"has {step_examples} examples; --nproc {step_examples} is enough",
        )
    return (
        f"micro-batches have {-(-step_examples // processes)} instead of {asked} examples, so that "
        f"{processes} processes can share a step of {step_examples}",
    )


def _choose_checkpointing(
    config: Config,
    machine: Machine,
    model_size: ModelSize,
    data: DataProfile,
    precision: Precision,
    partition: Partition,
    limits: MemoryLimits,
    count: Count,
) -> tuple[bool, tuple[str, ...]]:
    asked = limits.gradient_checkpointing or config.model.gradient_checkpointing
    if asked != "auto":
        return bool(asked), ()
    needed = estimate_memory_bytes(
        config,
        model_size,
        data,
        precision,
        has_checkpointing=False,
        partition=partition,
        count=count,
    )
    limit = memory_limit_bytes(machine, partition.processes)
    if needed <= 0.8 * limit:
        return False, ()
    return True, (
        f"gradient checkpointing is on: without it a step may need {size(needed)} of {size(limit)}",
    )
