"""Every number of a run, resolved: (Config, Machine, ModelShape, DataProfile) -> Plan. Pure.

Only the rate of each step is computed later, by `learning_rate` from the plan's peak: the loop
reads the plan, the report prints it, `plan.json` stores it. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .batch import NOT_BEGUN, RunBatch, batch_reasons, run_batch, smaller_budgets
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
from .run.smaller_sizes import batch_text, recounted
from .units import size

# A base model that takes more of a device leaves too little memory for training.
FITTING_FRACTION = 0.9
# A step that is estimated to take more of the memory is made smaller, or checkpointed.
CHECKPOINTING_FRACTION = 0.8
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
    # The budget of a micro-batch (0: cut by examples), the number of micro-batches a step, about,
    # and what that follows from.
    micro_batch_tokens: int
    step_micro_batches: int
    micro_batch_multiple: int
    step_tokens: int
    longest_tokens: int
    run_batch: str
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
    shared_prefix: str = ""  # the tokens that repeat a prefix; empty: too few
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
    begun: RunBatch = NOT_BEGUN,
    reasons: tuple[str, ...] = (),
    count: Count = uncounted,
) -> Plan:
    """Resolve a run's numbers; `machine`, `precision` and `attention` come from the backend.

    `limits` are the reduced sizes after the run was out of memory. `begun` is the batch of the
    run that continues, with whatever number of processes it began.

    Raises:
        ValueError: there are no rows; the data check rejects that first.
    """
    if data.rows < 1:
        raise ValueError("no rows to train on")
    training = config.training
    batch = run_batch(training, begun, processes, data.longest, machine.device)
    steps_per_epoch = math.ceil(data.rows / batch.examples)
    total, warmup = steps_of(training, steps_per_epoch)
    # With fewer micro-batches than processes, micro-batches become smaller.
    as_asked = min(training.per_device_train_batch_size, -(-batch.examples // processes))
    micro_batch = min(as_asked, limits.micro_batch_examples or as_asked)
    eval_batch = training.per_device_eval_batch_size
    eval_batch = min(eval_batch, limits.eval_batch_examples or eval_batch)
    sizes = {
        "micro_batch_examples": micro_batch,
        "step_examples": batch.examples,
        "micro_batch_multiple": batch.multiple,
        "step_tokens": round(data.tokens / data.rows * batch.examples),
        "longest_tokens": data.longest,
    }

    def estimate(tokens: int, has_checkpointing: bool = False) -> int:
        counted = recounted(sizes | {"processes": processes, "micro_batch_tokens": tokens})
        partition = Partition(
            processes,
            parallelism,
            micro_batch,
            # Without a GPU the layers are in host memory anyway.
            is_offloaded=training.offload_param_device == "cpu" and machine.has_gpu,
            eval_batch=eval_batch,
            accumulates=counted["step_micro_batches"] > processes,
            micro_batch_tokens=tokens,
            step_examples=batch.examples,
            is_padded=not padding_free,
            is_on_gpu=machine.has_gpu,
        )
        return estimate_memory_bytes(
            config,
            model_size,
            data,
            precision,
            has_checkpointing=has_checkpointing,
            partition=partition,
            count=count,
        )

    limit = memory_limit_bytes(machine, processes)
    tokens = min(batch.tokens, limits.micro_batch_tokens or batch.tokens)
    # A run that has begun keeps its budget, whatever machine it is on now.
    is_open = training.max_tokens_per_micro_batch == "auto" and not begun.examples
    is_open = is_open and tokens == batch.tokens > 0
    smaller = smaller_budgets(tokens, data.longest, machine.device)[1:] if is_open else []
    fit = _fit(config, limit, tokens, smaller, limits, estimate)
    tokens = fit.micro_batch_tokens
    batch = replace(batch, tokens=tokens) if is_open else batch
    counted = recounted(sizes | {"processes": processes, "micro_batch_tokens": tokens})
    return Plan(
        device=machine.device,
        processes=processes,
        parallelism=parallelism,
        threads=max(1, machine.cores // processes),
        precision=precision,
        attention=attention,
        padding_free=padding_free,
        gradient_checkpointing=fit.gradient_checkpointing,
        rows=data.rows,
        micro_batch_examples=micro_batch,
        step_examples=batch.examples,
        micro_batch_multiple=batch.multiple,
        step_tokens=sizes["step_tokens"],
        longest_tokens=data.longest,
        micro_batches=counted["micro_batches"],
        micro_batch_tokens=tokens,
        step_micro_batches=counted["step_micro_batches"],
        run_batch=str(batch),
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
        estimated_memory_bytes=estimate(tokens, fit.gradient_checkpointing),
        memory_limit_bytes=limit,
        reasons=(
            *reasons,
            *fit.reasons,
            *batch_reasons(training, batch, processes),
            *limits.reasons(as_asked, training.per_device_eval_batch_size, batch.tokens),
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
    least: float = 0.0,
) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    warmup: peak * step / warmup; then with p the share done of the rest:
    linear peak * (1 - p), cosine peak * (1 + cos(pi p)) / 2, constant peak. With `least` the
    first two end at that fraction of the peak: f of it becomes least + f (1 - least).
    Source: the schedules of transformers.get_scheduler, compared in a test.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if kind == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    fraction = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * max(0.0, fraction * (1.0 - least) + least)


def _every(steps: int, per_epoch: int, steps_per_epoch: int) -> int:
    """Return the interval in steps; `per_epoch` takes priority."""
    return math.ceil(steps_per_epoch / per_epoch) if per_epoch else steps


def limited(plan: Plan, limits: MemoryLimits) -> Plan:
    """Return the plan of a run that continues with smaller batches."""
    smaller = replace(
        plan,
        micro_batch_examples=limits.micro_batch_examples,
        micro_batch_tokens=limits.micro_batch_tokens,
        eval_batch_examples=limits.eval_batch_examples,
        gradient_checkpointing=limits.gradient_checkpointing,
    )
    counted = recounted(asdict(smaller))
    return replace(
        smaller,
        micro_batches=counted["micro_batches"],
        step_micro_batches=counted["step_micro_batches"],
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


@dataclass(frozen=True, slots=True)
class _Fit:
    """How a step fits into memory: with checkpointing or without, and the tokens at a time."""

    gradient_checkpointing: bool
    micro_batch_tokens: int
    reasons: tuple[str, ...] = ()


def _fit(
    config: Config,
    limit: int,
    tokens: int,
    budgets: Sequence[int],
    limits: MemoryLimits,
    estimate: Callable[[int], int],
) -> _Fit:
    """Take one of the smaller budgets, or else checkpoint; `estimate` counts without."""
    asked = limits.gradient_checkpointing or config.model.gradient_checkpointing
    needed = estimate(tokens) if asked == "auto" else 0
    if asked != "auto" or needed <= CHECKPOINTING_FRACTION * limit:
        return _Fit(asked is True, tokens)
    if budgets and estimate(budgets[-1]) <= CHECKPOINTING_FRACTION * limit:
        smaller = next(b for b in budgets if estimate(b) <= CHECKPOINTING_FRACTION * limit)
        return _Fit(
            False,
            smaller,
            (
                f"micro-batches have at most {smaller:,} instead of {tokens:,} tokens, which may "
                f"need {size(needed)} of {size(limit)}",
            ),
        )
    return _Fit(
        True,
        tokens,
        (
            "gradient checkpointing is on: without it a step may need "
            f"{size(needed)} of {size(limit)}",
        ),
    )
