"""The peers: transformers' Trainer with PEFT, and TRL's SFTTrainer padded and packed.

    python -m comparison.trainers JOB.json trainer|trl-padded|trl-packed OUT.json

All in float32 without gradient checkpointing, which TRL would switch on, on the tokens and in the
order that the job has. The packed one makes its own steps, of as many blocks of `max_length` as
hold the tokens of an average step.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .job import GRADIENT_NORM, Job, Record, clocks, memory, row_numbers
from .plain import load


class ListDataset(Dataset):
    """Examples in memory, as torch wants them."""

    def __init__(self, examples: list[dict[str, list[int]]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


class Clock(TrainerCallback):
    """Records when steps begin and end, and the norms of their gradients."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.record.begin:
            self.record.begin = clocks()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.record.ends.append(clocks())

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "grad_norm" in logs:
            self.record.gradient_norms.append(float(logs["grad_norm"]))


def rows_of(inputs: dict[str, Any], numbers: dict[tuple[int, ...], int]) -> list[int]:
    """Return the numbers of the rows in a batch, padded or packed.

    Shapes: input_ids (B, L); packed (1, T), and positions begin at 0 with each row.
    """
    if "attention_mask" in inputs:
        kept = inputs["attention_mask"].bool()
        rows = [ids[mask] for ids, mask in zip(inputs["input_ids"], kept, strict=True)]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        rows = list(inputs["input_ids"][0].tensor_split(starts[1:]))
    return [numbers[tuple(row.tolist())] for row in rows]


def recording(kind: type, record: Record, numbers: dict[tuple[int, ...], int]) -> Any:
    """Return the trainer's class, which keeps the order of the rows and records each step."""

    class Recorded(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            record.step_rows.append(rows_of(inputs, numbers))
            tokens = inputs["input_ids"].numel()
            record.largest_batch_tokens = max(record.largest_batch_tokens, tokens)
            loss = super().training_step(model, inputs, *rest)
            record.losses.append(float(loss))
            return loss

    return Recorded


def settings(job: Job, out: Path, batch: int) -> dict[str, Any]:
    """Return the arguments that both trainers know."""
    return {
        "output_dir": str(out.parent / "trainer"),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": GRADIENT_NORM,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def make_plain(job: Job, model: Any, record: Record, out: Path) -> Any:
    """Return transformers' Trainer, which pads each batch to its longest row."""
    examples = job.examples()
    return recording(Trainer, record, row_numbers(examples))(
        model=model,
        args=TrainingArguments(**settings(job, out, job.step_rows)),
        train_dataset=ListDataset(examples),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job.model)),
        callbacks=[Clock(record)],
    )


def make_trl(job: Job, model: Any, record: Record, out: Path, *, is_packed: bool) -> Any:
    """Return TRL's trainer, which finds its rows tokenized."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    examples = job.examples()
    tokens = sum(len(one["input_ids"]) for one in examples)
    steps = math.ceil(len(examples) / job.step_rows)
    batch = max(1, round(tokens / steps / job.max_length)) if is_packed else job.step_rows
    return recording(SFTTrainer, record, row_numbers(examples))(
        model=model,
        args=SFTConfig(**settings(job, out, batch), max_length=job.max_length, packing=is_packed),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Clock(record)],
    )


def run(job: Job, kind: str, out: Path) -> Record:
    """Train; return what came out."""
    model = load(job)
    record = Record()
    if kind == "trainer":
        trainer = make_plain(job, model, record, out)
    else:
        trainer = make_trl(job, model, record, out, is_packed=kind == "trl-packed")
    trainer.train()
    record.peak_bytes = memory("VmHWM")
    record.adapter = str(out.with_suffix(""))
    trainer.model.save_pretrained(record.adapter)
    return record


if __name__ == "__main__":
    target = Path(sys.argv[3])
    run(Job.read(Path(sys.argv[1])), sys.argv[2], target).write(target)
