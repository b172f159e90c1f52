"""The memory that a process needs: (model shape, data, batch sizes) -> bytes. Pure.

Imports no torch: the memory of a step beyond weights and optimizer states is counted by
`model.footprint`, which callers pass in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .config.schema import Config, TrainingSection
from .machine import Device, Machine

Precision = Literal["float32", "float16", "bfloat16"]
Parallelism = Literal["none", "ddp", "fsdp", "deepspeed"]
# A process before any model is loaded: the interpreter, torch, transformers, peft
# (487 MB measured on the CPU; CUDA's context comes on top on a GPU).
RUNTIME_BYTES = 500 << 20
# Layers gathered at the same time: the current one and the next; DeepSpeed also has a gather buffer
# (3.4 measured on a CPU).
WHOLE_LAYERS = {"fsdp": 2.0, "deepspeed": 3.5}
# 4 bits: a float32 scale for 64 weights; or, double quantized, one byte for 64 and a float32
# for 256 of those.
SCALE_BYTES = 4 / 64
DOUBLE_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
# AdamW's two moments per parameter; paged ones may leave the device. In 8 bits each has a float32
# scale per 256 numbers.
MOMENT_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_32bit": 0.0,
    "paged_adamw_8bit": 0.0,
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The base model's facts for the plan; parameters are counts, not bytes."""

    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    trainable_parameters: int
    max_positions: int
    # Never quantized: embeddings, norms, the head.
    unquantized_parameters: int = 0


@dataclass(frozen=True, slots=True)
class DataProfile:
    """The prepared data's facts for the plan; lengths in tokens."""

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    eval_rows: int = 0
    # The longest rows, longest first, and the most supervised tokens in one; 0: all of them.
    longest_rows: tuple[int, ...] = ()
    most_supervised: int = 0

    def batch(self, examples: int) -> tuple[int, ...]:
        """Return the lengths of the largest batch of that many rows."""
        rows = self.longest_rows[:examples]
        return rows + (rows[-1] if rows else self.longest,) * (examples - len(rows))

    def fill(self, tokens: int, examples: int, *, is_padded: bool) -> tuple[int, ...]:
        """Return the lengths of the largest batch of so many tokens, and examples at most."""
        left = max(tokens, self.longest)
        if is_padded:
            count = min(examples, -(-left // self.longest))
            return (min(self.longest, left // count),) * count
        rows: list[int] = []
        for length in self.batch(examples):
            if length >= left:
                return (*rows, left)
            rows.append(length)
            left -= length
        return tuple(rows)

    def cut(self, length: int) -> DataProfile:
        """Return the profile with no row longer than `length`."""
        return replace(
            self,
            longest=min(length, self.longest),
            longest_rows=tuple(min(length, row) for row in self.longest_rows),
        )


@dataclass(frozen=True, slots=True)
class Partition:
    """The share of one process; `micro_batch` 0: as configured.

    `is_offloaded`: its layers are kept in host memory. `eval_batch` 0: as configured.
    `accumulates`: a step has several micro-batches. `micro_batch_tokens`: their size; 0: by
    `micro_batch`. None has more than `step_examples`. Examples are padded where `is_padded`.
    `is_on_gpu`: it computes there, so that copies in host memory take none of its own.
    """

    processes: int = 1
    parallelism: Parallelism = "none"
    micro_batch: int = 0
    is_offloaded: bool = False
    eval_batch: int = 0
    accumulates: bool = True
    is_on_gpu: bool = False
    micro_batch_tokens: int = 0
    step_examples: int = 1
    is_padded: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """The work that a process has in memory: a micro-batch of training or of an evaluation.

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
# Of one tensor of float32 logits; two are in memory at a time. Fewer positions than 128 make the
# head's product slow (16% at 64, measured on a CPU, where 512 and 1024 take the same time).
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
FEWEST_POSITIONS, MOST_POSITIONS = 128, 1024
# Returns the peak of live bytes for some work, without weights and optimizer states.
Count = Callable[[Work], int]


def loss_chunk(training: TrainingSection, vocabulary: int, device: Device) -> int:
    """Return how many supervised positions go through the head at a time.

    A pure function of the run's inputs, because gradients are added up in this order.
    """
    if training.loss_chunk_tokens != "auto":
        return training.loss_chunk_tokens
    fitting = LOGITS_BYTES[device] // (4 * max(1, vocabulary))
    # A multiple of 64, which kernels have blocks for.
    return min(MOST_POSITIONS, max(FEWEST_POSITIONS, fitting // 64 * 64))


def uncounted(_work: Work) -> int:
    """Count nothing, for a plan whose memory does not matter."""
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

    The largest work is the longest examples in one micro-batch, or an evaluation batch (which
    keeps nothing for a backward pass). Meanwhile the last checkpoint's copy of the adapter and its
    moments is in host memory.
    """
    training = config.training
    weights = weights_bytes(config, model_size, precision, partition)
    state = 4 + MOMENT_BYTES[training.optim]  # bytes per float32 adapter parameter
    bits = 4 if config.model.use_4bit else 8 if config.model.use_8bit else 16
    most = data.most_supervised or data.longest
    tokens = partition.micro_batch_tokens
    lengths = (
        data.fill(tokens, partition.step_examples, is_padded=partition.is_padded)
        if tokens
        else data.batch(partition.micro_batch or training.per_device_train_batch_size)
    )
    train = Work(
        lengths,
        most,
        gradient_checkpointing=has_checkpointing,
        accumulates=partition.accumulates,
        bits=bits,
    )
    works = [count(train)]
    if data.eval_rows:
        batch = data.batch(partition.eval_batch or training.per_device_eval_batch_size)
        works.append(count(Work(batch, most, is_training=False, accumulates=False, bits=bits)))
    copies = 1 if partition.is_on_gpu else 2
    return int(
        RUNTIME_BYTES + weights + copies * model_size.trainable_parameters * state + max(works)
    )


def weights_bytes(
    config: Config, model_size: ModelSize, precision: Precision, partition: Partition
) -> float:
    """Return the bytes of the base model's weights in one process.

    With fsdp and deepspeed each process holds its shard of every layer, a few gathered layers, and
    embeddings and head, which are not sharded.
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
    """Return the bytes that every process holds in full, and the bytes of the packed weights.

    Held in full are the weights that are not quantized, and the scales.
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
    """Return the memory available to one process: its GPU's, or its share of the machine's."""
    if machine.has_gpu:
        return min(gpu.memory_bytes for gpu in machine.gpus)
    return machine.memory_bytes // processes
