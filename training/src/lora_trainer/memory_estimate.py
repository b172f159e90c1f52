"""What a process needs in memory, from the counts of its work: (shapes, data) -> bytes. Pure.

Imports no torch: what a step needs beyond weights and optimizer states is counted by
`model.footprint`, which is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .config.schema import Config
from .machine import Machine

Precision = Literal["float32", "float16", "bfloat16"]
Parallelism = Literal["none", "ddp", "fsdp", "deepspeed"]
# What a process holds before any model: the interpreter, torch, transformers, peft
# (487 MB measured on the CPU; CUDA's context comes on top on a GPU).
RUNTIME_BYTES = 500 << 20
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
class ModelSize:
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
    supervised_tokens: int
    longest: int
    eval_rows: int = 0
    # The longest rows, in falling order, and the most supervised tokens of one; 0: all of them.
    longest_rows: tuple[int, ...] = ()
    most_supervised: int = 0

    def batch(self, examples: int) -> tuple[int, ...]:
        """Return the lengths of the largest batch that so many rows can make."""
        rows = self.longest_rows[:examples]
        return rows + (rows[-1] if rows else self.longest,) * (examples - len(rows))

    def cut(self, length: int) -> DataProfile:
        """Return the profile with no row longer than `length`."""
        return replace(
            self,
            longest=min(length, self.longest),
            longest_rows=tuple(min(length, row) for row in self.longest_rows),
        )


@dataclass(frozen=True, slots=True)
class Partition:
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

    `lengths` are the examples', in tokens; of each at most `supervised_tokens` are supervised.
    `accumulates` gradients of earlier micro-batches. `bits` are those of a quantized weight.
    """

    lengths: tuple[int, ...]
    supervised_tokens: int
    gradient_checkpointing: bool = False
    is_training: bool = True
    accumulates: bool = True
    bits: int = 16


UNDIVIDED = Partition()
# Returns the most bytes that live at once in some work, weights and optimizer states left out.
Count = Callable[[Work], int]


def uncounted(_work: Work) -> int:
    """Count nothing, for a plan whose memory is of no interest."""
    return 0


def estimate_memory_bytes(
    config: Config,
    model_size: ModelSize,
    data: DataProfile,
    precision: Precision,
    *,
    has_checkpointing: bool,
    partition: Partition = UNDIVIDED,
    count: Count = uncounted,
) -> int:
    """Return a process's peak memory: runtime, weights, adapter states, and the largest work.

    That is counted for the longest examples together; an evaluation's batch, which keeps
    nothing for a backward pass, may still be the larger one, and so may a checkpoint's copy
    of the adapter and its moments.
    """
    training = config.training
    weights = weights_bytes(config, model_size, precision, partition)
    state = 4 + MOMENT_BYTES[training.optim]  # the float32 adapter's, a parameter
    bits = 4 if config.model.use_4bit else 8 if config.model.use_8bit else 16
    most = data.most_supervised or data.longest
    asked = training.per_device_train_batch_size
    train = Work(
        data.batch(partition.micro_batch or asked),
        most,
        gradient_checkpointing=has_checkpointing,
        accumulates=training.gradient_accumulation_steps > 1 or 0 < partition.micro_batch < asked,
        bits=bits,
    )
    works = [count(train)]
    if data.eval_rows:
        batch = data.batch(partition.eval_batch or training.per_device_eval_batch_size)
        works.append(count(Work(batch, most, is_training=False, accumulates=False, bits=bits)))
    step = max(*works, model_size.trainable_parameters * state)
    return int(RUNTIME_BYTES + weights + model_size.trainable_parameters * state + step)


def weights_bytes(
    config: Config, model_size: ModelSize, precision: Precision, partition: Partition
) -> float:
    """Return the bytes of the base model's weights in one process.

    With fsdp and deepspeed each holds its part of every layer, some layers whole while they
    compute, and embeddings and head, which are not shared out.
    """
    width = 4 if precision == "float32" else 2
    whole = float(
        min(model_size.parameters, 2 * model_size.vocab_size * model_size.hidden_size) * width
    )
    layers = model_size.parameters * width - whole
    if _is_quantized(config):
        whole, layers = _quantized_bytes(config, model_size, width)
    if partition.parallelism in WHOLE_LAYERS:
        kept = 0 if partition.is_offloaded else layers / partition.processes
        layers = kept + WHOLE_LAYERS[partition.parallelism] * layers / model_size.layers
    return whole + layers


def _is_quantized(config: Config) -> bool:
    return config.model.use_4bit or config.model.use_8bit


def _quantized_bytes(config: Config, model_size: ModelSize, width: int) -> tuple[float, float]:
    """Return the bytes of what each process has whole, and of the packed weights.

    Whole are what is not quantized, and the scales.
    """
    if config.model.use_8bit:
        each, scale = 1.0, 4 / model_size.hidden_size
    else:
        each = 0.5
        scale = DOUBLE_SCALE_BYTES if config.model.bnb_4bit_use_double_quant else SCALE_BYTES
    kept = model_size.unquantized_parameters
    packed = model_size.parameters - kept
    return kept * width + packed * scale, packed * each


def memory_limit_bytes(machine: Machine, processes: int) -> int:
    """Return what one process may use: its GPU's memory, or its part of the machine's."""
    if machine.has_gpu:
        return min(gpu.memory_bytes for gpu in machine.gpus)
    return machine.memory_bytes // processes
