"""Every number of a run, resolved: (Config, Machine, ModelShape, DataProfile) -> Plan. Pure.

Nothing is derived later: the loop reads the plan, the report prints it, `plan.json`
keeps it. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .config.schema import Config, TrainingSection
from .errors import ConfigError
from .machine import Device, Machine
from .run.memory_limits import MemoryLimits

Precision = Literal["float32", "float16", "bfloat16"]
Parallelism = Literal["none", "ddp", "fsdp", "deepspeed"]
# What a process holds before any model: the interpreter, torch, transformers, peft
# (487 MB measured on the CPU; CUDA's context comes on top on a GPU).
RUNTIME_BYTES = 500 << 20
# A base model that takes more of a device leaves no room to train on it.
FITTING_SHARE = 0.9
# Layers that are whole at a time: the one that computes and the next; DeepSpeed gathers into a
# buffer of its own too (3.4 found on a CPU).
WHOLE_LAYERS = {"fsdp": 2.0, "deepspeed": 3.5}
# 4 bits: a float32 scale for 64 weights; or, double quantized, one byte for 64 and a float32
# for 256 of those.
SCALE_BYTES = 4 / 64
DOUBLE_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
# AdamW's two moments, a parameter; paged ones may leave the device. In 8 bits each has a
# float32 scale for 256 numbers.
MOMENT_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_32bit": 0.0,
    "paged_adamw_8bit": 0.0,
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the plan needs to know of the base model; parameters are counts, not bytes."""

    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    trainable_parameters: int
    max_positions: int
    # Those that 4 and 8 bits leave alone: embeddings, norms, the head.
    unquantized_parameters: int = 0


@dataclass(frozen=True, slots=True)
class DataProfile:
    """What the plan needs to know of the prepared data; lengths in tokens."""

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    eval_rows: int = 0
    # The longest rows, in falling order, and the most supervised tokens of one; 0: all of them.
    longest_rows: tuple[int, ...] = ()
    most_trained: int = 0

    def batch(self, examples: int) -> tuple[int, ...]:
        """Return the lengths of the largest batch that so many rows can make."""
        found = self.longest_rows[:examples]
        return found + (found[-1] if found else self.longest,) * (examples - len(found))

    def cut(self, length: int) -> DataProfile:
        """Return the profile with no row longer than `length`."""
        return replace(
            self,
            longest=min(length, self.longest),
            longest_rows=tuple(min(length, row) for row in self.longest_rows),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several processes has of the work; `micro_batch` 0: as configured.

    `is_offloaded`: its part of the layers lies in the host's memory. `eval_batch` likewise.
    """

    processes: int = 1
    parallelism: Parallelism = "none"
    micro_batch: int = 0
    is_offloaded: bool = False
    eval_batch: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What a process has in memory at a time: a micro-batch of training, or of an evaluation.

    `lengths` are the examples', in tokens; of each at most `trained_tokens` are supervised.
    `accumulates` gradients of earlier micro-batches. `bits` are those of a quantized weight.
    """

    lengths: tuple[int, ...]
    trained_tokens: int
    gradient_checkpointing: bool = False
    is_trained: bool = True
    accumulates: bool = True
    bits: int = 16


ALL = Share()
AS_CONFIGURED = MemoryLimits()
# Returns the most bytes that live at once in some work, weights and optimizer states left out.
Count = Callable[[Work], int]


def uncounted(_work: Work) -> int:
    """Count nothing, for a plan whose memory is of no interest."""
    return 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The resolved run. `reasons` says, for each choice that was automatic, why."""

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
    # Of one example with gradient checkpointing, and what fits where that does not (`smaller`).
    least_memory_bytes: int = 0
    smaller_plans: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        lists = {"reasons": list(self.reasons), "smaller_plans": list(self.smaller_plans)}
        return asdict(self) | lists


def make_plan(
    config: Config,
    machine: Machine,
    shape: ModelShape,
    data: DataProfile,
    *,
    precision: Precision,
    attention: str,
    padding_free: bool,
    processes: int = 1,
    parallelism: Parallelism = "none",
    limits: MemoryLimits = AS_CONFIGURED,
    reasons: tuple[str, ...] = (),
    count: Count = uncounted,
) -> Plan:
    """Resolve a run's numbers; `machine`, `precision` and `attention` are the backend's.

    `limits` are what the run was cut down to when its memory ran out.

    A step is per_device_train_batch_size x gradient_accumulation_steps examples whatever
    the number of processes: they share them out, and no number but the time changes.

    Raises:
        ValueError: there is nothing to train (no row); the data check refuses that first.
    """
    if data.rows < 1:
        raise ValueError("no rows to train on")
    training = config.training
    step_examples = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps_per_epoch = math.ceil(data.rows / step_examples)
    total, warmup = steps_of(training, steps_per_epoch)
    # Where there are fewer micro-batches than processes, these become smaller.
    as_asked = min(training.per_device_train_batch_size, -(-step_examples // processes))
    micro_batch = min(as_asked, limits.micro_batch_examples or as_asked)
    eval_batch = training.per_device_eval_batch_size
    eval_batch = min(eval_batch, limits.eval_batch_examples or eval_batch)
    # Where there is no GPU, the host's memory is where the layers are anyway.
    is_offloaded = config.training.offload_param_device == "cpu" and machine.has_gpu
    share = Share(processes, parallelism, micro_batch, is_offloaded, eval_batch)
    chosen = _choose_checkpointing(config, machine, shape, data, precision, share, limits, count)
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
        micro_batches=-(-math.ceil(step_examples / micro_batch) // processes),
        step_examples=step_examples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        peak_learning_rate=training.learning_rate,
        eval_rows=data.eval_rows,
        eval_batch_examples=eval_batch,
        eval_every_steps=training.eval_steps if data.eval_rows else 0,
        save_every_steps=config.output.save_steps,
        loss_chunk_tokens=training.loss_chunk_tokens,
        parameters=shape.parameters,
        trainable_parameters=shape.trainable_parameters,
        estimated_memory_bytes=estimate_memory_bytes(
            config,
            shape,
            data,
            precision,
            has_checkpointing=checkpointing,
            share=share,
            count=count,
        ),
        memory_limit_bytes=memory_limit_bytes(machine, processes),
        reasons=(
            *reasons,
            *why,
            *_idle_reasons(config, step_examples, processes),
            *limits.reasons(as_asked, training.per_device_eval_batch_size),
        ),
    )


def steps_of(training: TrainingSection, steps_per_epoch: int) -> tuple[int, int]:
    """Return the number of steps, and how many of them are warmup."""
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


def limited(plan: Plan, limits: MemoryLimits) -> Plan:
    """Return the plan of a run that goes on with smaller batches."""
    batches = math.ceil(plan.step_examples / limits.micro_batch_examples)
    return replace(
        plan,
        micro_batch_examples=limits.micro_batch_examples,
        micro_batches=-(-batches // plan.processes),
        eval_batch_examples=limits.eval_batch_examples,
        gradient_checkpointing=limits.gradient_checkpointing,
    )


def estimate_memory_bytes(
    config: Config,
    shape: ModelShape,
    data: DataProfile,
    precision: Precision,
    *,
    has_checkpointing: bool,
    share: Share = ALL,
    count: Count = uncounted,
) -> int:
    """Return a process's peak memory: runtime, weights, adapter states, and the largest work.

    That is counted for the longest examples together; an evaluation's batch, which keeps
    nothing for a backward pass, may still be the larger one, and so may a checkpoint's copy
    of the adapter and its moments.
    """
    training = config.training
    weights = weights_bytes(config, shape, precision, share)
    state = 4 + MOMENT_BYTES[training.optim]  # the float32 adapter's, a parameter
    bits = 4 if config.model.use_4bit else 8 if config.model.use_8bit else 16
    most = data.most_trained or data.longest
    asked = training.per_device_train_batch_size
    train = Work(
        data.batch(share.micro_batch or asked),
        most,
        gradient_checkpointing=has_checkpointing,
        accumulates=training.gradient_accumulation_steps > 1 or 0 < share.micro_batch < asked,
        bits=bits,
    )
    works = [count(train)]
    if data.eval_rows:
        batch = data.batch(share.eval_batch or training.per_device_eval_batch_size)
        works.append(count(Work(batch, most, is_trained=False, accumulates=False, bits=bits)))
    step = max(*works, shape.trainable_parameters * state)
    return int(RUNTIME_BYTES + weights + shape.trainable_parameters * state + step)


def weights_bytes(config: Config, shape: ModelShape, precision: Precision, share: Share) -> float:
    """Return the bytes of the base model's weights in one process.

    With fsdp and deepspeed each holds its part of every layer, some layers whole while they
    compute, and embeddings and head, which are not shared out.
    """
    width = 4 if precision == "float32" else 2
    whole = float(min(shape.parameters, 2 * shape.vocab_size * shape.hidden_size) * width)
    layers = shape.parameters * width - whole
    if _is_quantized(config):
        whole, layers = _quantized_bytes(config, shape, width)
    if share.parallelism in WHOLE_LAYERS:
        kept = 0 if share.is_offloaded else layers / share.processes
        layers = kept + WHOLE_LAYERS[share.parallelism] * layers / shape.layers
    return whole + layers


def _is_quantized(config: Config) -> bool:
    return config.model.use_4bit or config.model.use_8bit


def _quantized_bytes(config: Config, shape: ModelShape, width: int) -> tuple[float, float]:
    """Return the bytes of what each process has whole, and of the packed weights.

    Whole are what is not quantized, and the scales.
    """
    if config.model.use_8bit:
        each, scale = 1.0, 4 / shape.hidden_size
    else:
        each = 0.5
        scale = DOUBLE_SCALE_BYTES if config.model.bnb_4bit_use_double_quant else SCALE_BYTES
    kept = shape.unquantized_parameters
    packed = shape.parameters - kept
    return kept * width + packed * scale, packed * each


def memory_limit_bytes(machine: Machine, processes: int) -> int:
    """Return what one process may use: its GPU's memory, or its part of the machine's."""
    if machine.has_gpu:
        return min(gpu.memory_bytes for gpu in machine.gpus)
    return machine.memory_bytes // processes


def choose_parallelism(
    config: Config, machine: Machine, shape: ModelShape, precision: Precision, processes: int
) -> tuple[Parallelism, str]:
    """Return how processes share the work, and why where that was chosen."""
    asked = config.training.parallelism
    if processes == 1 and asked != "deepspeed":
        return "none", ""
    if processes == 1 and config.training.offload_param_device == "none":
        return "none", "deepspeed is not used: one process shares nothing, and nothing is offloaded"
    needed = RUNTIME_BYTES + weights_bytes(config, shape, precision, ALL)
    limit = memory_limit_bytes(machine, processes)
    if asked == "deepspeed":
        return asked, _reading_reason(needed * processes, machine)
    if asked != "auto":
        return asked, ""
    if needed <= FITTING_SHARE * limit:
        return "ddp", ""
    return "fsdp", (
        f"parallelism is fsdp: the base model needs {needed / 2**30:.1f} GB a process, and one "
        f"has {limit / 2**30:.1f} GB"
    )


def _reading_reason(needed: float, machine: Machine) -> str:
    if needed <= machine.memory_bytes:
        return ""
    return (
        f"with deepspeed all processes read the base model at once: {needed / 2**30:.1f} GB, and "
        f"the machine has {machine.memory_bytes / 2**30:.1f} GB; with fsdp one after another"
    )


def process_count(config: Config, machine: Machine) -> int:
    """Return how many processes train: one per visible GPU, unless the user says.

    Raises:
        ConfigError: more are asked for than there are GPUs.
    """
    asked, gpus = config.training.nproc, len(machine.gpus)
    if asked == "auto":
        return max(1, gpus)
    if 0 < gpus < asked:
        raise ConfigError.of(
            f"nproc {asked} is more than the visible GPUs",
            where="training.nproc",
            why=f"each process has a GPU of its own, and there {'is' if gpus == 1 else 'are'} "
            f"{gpus}",
            remedy=f"--nproc {gpus}, or --nproc auto",
        )
    return asked


def _idle_reasons(config: Config, step_examples: int, processes: int) -> tuple[str, ...]:
    asked = config.training.per_device_train_batch_size
    if processes <= step_examples // asked:
        return ()
    if step_examples < processes:
        return (
            f"{processes - step_examples} of {processes} processes have nothing to do: a step "
            f"has {step_examples} examples; raise gradient_accumulation_steps",
        )
    return (
        f"a micro-batch has {-(-step_examples // processes)} instead of {asked} examples, so that "
        f"{processes} processes share a step of {step_examples}; raise "
        f"gradient_accumulation_steps to {processes} to fill them",
    )


def _choose_checkpointing(
    config: Config,
    machine: Machine,
    shape: ModelShape,
    data: DataProfile,
    precision: Precision,
    share: Share,
    limits: MemoryLimits,
    count: Count,
) -> tuple[bool, tuple[str, ...]]:
    asked = limits.gradient_checkpointing or config.model.gradient_checkpointing
    if asked != "auto":
        return bool(asked), ()
    needed = estimate_memory_bytes(
        config, shape, data, precision, has_checkpointing=False, share=share, count=count
    )
    limit = memory_limit_bytes(machine, share.processes)
    if needed <= 0.8 * limit:
        return False, ()
    return True, (
        f"gradient checkpointing is on: without it a step may need {needed / 2**30:.1f} GB "
        f"of {limit / 2**30:.1f} GB",
    )
