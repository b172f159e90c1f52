"""This project as a contestant: the command in processes of its own, or the loop in this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .job import GRADIENT_NORM, IGNORED, Job, Record, clocks, memory, reset_peak

SEED = 42


def config_of(job: Job, output: Path) -> dict[str, Any]:
    """Return the run's configuration."""
    return {
        "model_name_or_path": job.model,
        "adapter_name_or_path": str(job.adapter),
        "dataset": str(job.rows),
        "max_seq_length": job.max_length,
        "dataset_cache_dir": str(Path(job.folder) / "tokenized"),
        "per_device_train_batch_size": job.step_rows,
        "num_train_epochs": 1.0,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": GRADIENT_NORM,
        "seed": SEED,
        "bf16": False,
        "gradient_checkpointing": False,
        "output_dir": str(output),
        "save_steps": 0,
        "report_to": [],
        "health_port": 0,
    }


def prepare(job: Job, rows: list[dict[str, Any]]) -> None:
    """Write the rows, their tokens in the order of training, and an adapter to start from."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lora_trainer.config.schema import ALL_LINEAR
    from lora_trainer.config.settings import resolve
    from lora_trainer.data.batches import Sampler
    from lora_trainer.model import load
    from lora_trainer.train.datasets import open_data

    job.rows.parent.mkdir(parents=True, exist_ok=True)
    job.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    torch.manual_seed(SEED)
    lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=ALL_LINEAR,
                      task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would leave A without a gradient
            torch.nn.init.normal_(parameter, std=1e-2)
    model.save_pretrained(job.adapter)
    config = resolve(None, {}, (), config_of(job, job.rows.parent)).config
    source = load.locate(config.model)
    data = open_data(config, source, load.load_tokenizer(source, config.model)).train
    rows_in_order = Sampler(len(data), job.step_rows, SEED).epoch_order(0)
    with job.tokens.open("w") as file:
        for number in rows_in_order:
            ids, mask = data[int(number)]
            labels = [
                int(token) if is_trained else IGNORED
                for token, is_trained in zip(ids, mask, strict=True)
            ]
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels}) + "\n")


def command(job: Job, output: Path) -> list[str]:
    """Return the command that trains the job into a folder."""
    path = output.with_suffix(".config.json")
    path.write_text(json.dumps(config_of(job, output)))
    return [sys.executable, "-m", "lora_trainer", "train", "--config", str(path)]


def record_of(job: Job, output: Path) -> Record:
    """Return what the command reports in its own files."""
    from lora_trainer.run.events import PhaseChanged, StepDone, parse_line

    lines = (output / "events.jsonl").read_text().splitlines()
    events = [event for event in map(parse_line, lines) if event is not None]
    steps = [event for event in events if isinstance(event, StepDone)]
    begin = next(e.time for e in events if isinstance(e, PhaseChanged) and e.phase == "training")
    plan = json.loads((output / "plan.json").read_text())
    record = _record(job, steps, plan)
    record.begin = [begin, 0.0]
    record.ends = [[step.time, 0.0] for step in steps]
    record.peak_bytes = steps[-1].memory_bytes
    record.adapter = str(output / "final_model")
    return record


def train_here(job: Job, output: Path) -> Record:
    """Train with the session and the loop of a run, in this process."""
    from lora_trainer.config.settings import resolve
    from lora_trainer.run.events import Event, StepDone
    from lora_trainer.train.loop import train
    from lora_trainer.train.session import open_session

    steps: list[StepDone] = []
    ends: list[list[float]] = []

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event)
            ends.append(clocks())

    setup = open_session(resolve(None, {}, (), config_of(job, output)).config, output, emit)
    state = setup.restore(None)
    for weights in setup.causal.model.parameters():  # read the pages of the mapped file
        weights.detach().sum()
    loaded = reset_peak()
    begin = clocks()
    train(setup.context(emit, lambda: False), state)
    record = _record(job, steps, setup.plan.to_dict())
    record.begin, record.ends, record.peak_bytes = begin, ends, memory("VmHWM")
    record.loaded_bytes = loaded
    record.adapter = str(output / "final_model")
    setup.causal.model.save_pretrained(record.adapter)
    return record


def _record(job: Job, steps: list[Any], plan: dict[str, Any]) -> Record:
    lengths = [len(one["input_ids"]) for one in job.examples()]
    starts = range(0, len(lengths), job.step_rows)
    numbers = [list(range(start, min(start + job.step_rows, len(lengths)))) for start in starts]
    steps_lengths = [[lengths[row] for row in rows] for rows in numbers]
    return Record(
        step_rows=numbers,
        losses=[step.loss for step in steps],
        gradient_norms=[step.grad_norm for step in steps],
        largest_batch_tokens=max(_largest(own, plan) for own in steps_lengths),
    )


def _largest(lengths: list[int], plan: dict[str, Any]) -> int:
    """Return the tokens of the largest micro-batch of a step of examples with these lengths."""
    from lora_trainer.data.batches import cut_by_tokens

    budget, size = plan["micro_batch_tokens"], plan["micro_batch_examples"]
    if not budget:
        return max(sum(lengths[at : at + size]) for at in range(0, len(lengths), size))
    pieces = cut_by_tokens(lengths, budget, is_padded=not plan["padding_free"])
    return max(sum(lengths[index] for index in piece) for piece in pieces)
