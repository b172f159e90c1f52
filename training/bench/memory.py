"""Compare the plan's memory with measured steps and with published figures.

    python bench/memory.py measured          40 combinations on this CPU: counted and measured
    python bench/memory.py llama2            Llama 2 7B, 13B and 70B on a GPU, counted only

Results are in docs/decisions/0023.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_trainer.config.schema import Config
from lora_trainer.machine import Gpu, Machine
from lora_trainer.memory_estimate import DataProfile, Work
from lora_trainer.model import compat, load, quantize
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.backend import native_attention
from lora_trainer.model.flash import Kernel, VariableLength
from lora_trainer.model.footprint import Footprint, batch_of
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.plan import make_plan
from lora_trainer.train.dry_run import _unloaded, model_size_of
from lora_trainer.train.optim import make_optimizer

M_MMAP_THRESHOLD, MAPPED_FROM_BYTES = -3, 256 << 10
FAMILIES = ("Llama", "Qwen2", "Gemma2", "Mistral")
BATCHES = ((1536,), (384,) * 4, (128,) * 12, (768, 480, 240))
SHAPE = {
    "vocab_size": 4000, "hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 5,
    "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA_2 = {
    "7B": {},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One combination."""

    family: str
    dropout: float
    has_checkpointing: bool
    lengths: tuple[int, ...]
    rank: int
    chunk: int
    bits: int
    is_padded: bool
    precision: Any

    @property
    def config(self) -> Config:
        """Return it as a run's configuration."""
        lora = {"lora_r": self.rank, "lora_dropout": self.dropout,
                "lora_target_modules": "all-linear"}  # fmt: skip
        bits = {"use_4bit": self.bits == 4, "use_8bit": self.bits == 8}
        training = {"loss_chunk_tokens": self.chunk}
        return Config.model_validate({"lora": lora, "model": bits, "training": training})

    @property
    def work(self) -> Work:
        """Return what is in memory at a time."""
        most = max(self.lengths)
        return Work(self.lengths, most, self.has_checkpointing, bits=self.bits)


def cases(divisor: int = 1) -> list[Case]:
    """Return 40 combinations in which each value meets each value of the others.

    Args:
        divisor: A divisor of the lengths, where there is less time.
    """
    has_bits = quantize.works_on_cpu()
    return [
        Case(
            family=FAMILIES[i % 4],
            dropout=(0.0, 0.05)[i // 4 % 2],
            has_checkpointing=bool(i // 8 % 2),
            lengths=tuple(
                length // divisor
                for length in ((384,) if i in BFLOAT16 else BATCHES[i * 3 // 4 % 4])
            ),
            rank=(8, 64)[i // 2 % 2],
            chunk=(128, 1024)[i // 3 % 2],
            bits=(16, 16, 4, 16, 8)[i % 5] if has_bits and i not in BFLOAT16 else 16,
            is_padded=i % 7 == 6,
            precision="bfloat16" if i in BFLOAT16 else "float32",
        )
        for i in range(40)
    ]


BFLOAT16 = (5, 19)  # emulated on most CPUs, and slow


def base_config(case: Case) -> Any:
    """Return the configuration of a small model."""
    return getattr(transformers, f"{case.family}Config")(**SHAPE)


def counted(case: Case) -> int:
    """Return the bytes that the plan counts."""
    config = base_config(case)
    footprint = Footprint(
        case.config, config, partial(_unloaded, case.config), device="cpu",
        precision=case.precision, attention=native_attention(config),
        padding_free=not case.is_padded,
    )  # fmt: skip
    count = footprint(case.work)
    assert not footprint.faults, footprint.faults
    return count


def measured(case: Case) -> int:
    """Return how much the resident memory rises at most in a step, above what was there.

    malloc gives a large block back when it is freed, as MALLOC_MMAP_THRESHOLD_ has it do. A step
    of the same size comes first: the kernels that it makes and keeps are no part of the rise.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        config = base_config(case)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        section = case.config.model.model_copy(update={"model_name_or_path": folder})
        base = load.load_model(load.locate(section), section, dtype=dtype, device="cpu",
                               attention=native_attention(config))  # fmt: skip
        model = add_adapter(base, case.config.lora, seed=0)
        causal = CausalLM(model, device="cpu", padding_free=not case.is_padded, chunk=case.chunk,
                          precision=case.precision)  # fmt: skip
        if case.has_checkpointing:
            compat.enable_checkpointing(base)
        model.train()
        optimizer = make_optimizer(trainable_parameters(model), case.config.training)

        def step(batch: MicroBatch) -> None:
            for _ in range(2):
                causal.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step(batch_of(case.work))
        gc.collect()
        libc.malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
        step(batch_of(case.work))
        return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def compare(chosen: list[Case]) -> list[tuple[int, int]]:
    """Return bytes counted and measured of each case."""
    torch.set_num_threads(1)
    return [(counted(case), measured(case)) for case in chosen]


def judge(pairs: list[tuple[int, int]]) -> None:
    """Assert that nine in ten are within 15%, and that none is under by more than 5%."""
    ratios = sorted(count / took for count, took in pairs)
    assert ratios[0] >= 0.95, ratios
    close = sum(0.85 <= ratio <= 1.15 for ratio in ratios)
    assert close >= 0.9 * len(ratios) - 0.5, ratios


def llama_2(
    size: str, bits: int, *, rank: int, targets: Any, length: int, has_checkpointing: bool
) -> int:
    """Return the estimate for a Llama 2 on one GPU in bfloat16, a micro-batch of one example."""
    config = Config.model_validate({
        "lora": {"lora_r": rank, "lora_dropout": 0.05, "lora_target_modules": targets},
        "model": {"use_4bit": bits == 4, "use_8bit": bits == 8,
                  "gradient_checkpointing": has_checkpointing},
        "training": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
    })  # fmt: skip
    base = transformers.LlamaConfig(
        **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
           "num_hidden_layers": 32, "num_attention_heads": 32} | LLAMA_2[size]
    )  # fmt: skip
    unloaded = _unloaded(config, base)
    parameters = quantize.count_parameters(unloaded)
    with torch.device("meta"):
        trainable = trainable_parameters(add_adapter(unloaded, config.lora, seed=0))
    footprint = Footprint(
        config, base, partial(_unloaded, config), device="cuda", precision="bfloat16",
        attention="sdpa", padding_free=True,
        kernel=VariableLength(Kernel("PyTorch's", "torch.nn.attention.varlen")),
    )  # fmt: skip
    plan = make_plan(
        config, Machine(8, 1 << 40, (Gpu(0, "any", 1 << 40, (8, 0)),)),
        model_size_of(unloaded, parameters, trainable), DataProfile(100, 1, 1, length),
        precision="bfloat16", attention="packed", padding_free=True, count=footprint,
    )  # fmt: skip
    assert not footprint.faults, footprint.faults
    return plan.estimated_memory_bytes


def main(what: str) -> None:
    """Print one of the tables."""
    if what == "llama2":
        for size in LLAMA_2:
            for bits in (16, 8, 4):
                count = partial(llama_2, size, bits)
                plain = count(rank=8, targets=["q_proj", "v_proj"], length=1304,
                              has_checkpointing=False)  # fmt: skip
                saving = count(rank=16, targets="all-linear", length=1024, has_checkpointing=True)
                print(f"{size} {bits:2} bits: {plain / 1e9:6.1f} GB  {saving / 1e9:6.1f} GB")
        return
    pairs = []
    for case in cases():
        # A process each: what the heap keeps of one case is no part of the next.
        with multiprocessing.get_context("fork").Pool(1) as process:
            pairs += process.apply(compare, ([case],))
        count, took = pairs[-1]
        print(f"{count / 1e6:6.1f} {took / 1e6:6.1f} MB  {count / took:.3f}  {case}", flush=True)
    judge(pairs)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "measured")
