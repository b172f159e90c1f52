"""Training, scoring and generation with a small model in each precision, as a run does them."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lora_trainer.config.settings import resolve
from lora_trainer.run.events import Evaluated, Event, StepDone
from lora_trainer.train import evaluate
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.loop import train
from lora_trainer.train.session import open_session
from lora_trainer.train.setup import TrainingSetup

from . import criteria
from .models import write_folder, write_rows
from .record import Figures, Record
from .scale import Scale
from .versions import wait

ROWS, HELD_OUT, STEPS = 32, 8, 3
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"bf16": True},
    "float16": {"fp16": True},
    "4 bits": {"use_4bit": True},
    "8 bits": {"use_8bit": True},
}


def run(record: Record, scale: Scale) -> None:
    """Try each precision, one after the other."""
    from lora_trainer.model import quantize

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root, scale)
        for name, keys in KINDS.items():
            if "bits" in name and not quantize.installed_version():
                record.skip(name, quantize.NOT_INSTALLED)
                continue
            with record.attempt(name):
                _try(record, scale, name, open_small(root, name, max_steps=STEPS, **keys))
            torch.cuda.empty_cache()


def write_model(root: Path, scale: Scale) -> None:
    """Write the small model and its rows."""
    dtype = torch.bfloat16 if scale.has_gpu else torch.float32
    write_folder(root / "model", scale.small, device=scale.device, dtype=dtype)
    write_rows(root / "train.jsonl", 0, ROWS)
    write_rows(root / "held-out.jsonl", 900, HELD_OUT)


def settings_of(root: Path, output: str, **keys: Any) -> dict[str, Any]:
    """Return a run's keys: the small model, and what the given keys change."""
    return {
        "model_name_or_path": str(root / "model"),
        "dataset": str(root / "train.jsonl"),
        "eval_dataset": str(root / "held-out.jsonl"),
        "dataset_cache_dir": str(root / "cache"),
        "output_dir": str(root / output),
        "preprocessing_num_workers": 1,
        "max_seq_length": 256,
        "per_device_train_batch_size": 8,
        "report_to": [],
        "health_port": 0,
        "nproc": 1,
    } | keys


def open_small(root: Path, name: str, **keys: Any) -> TrainingSetup:
    """Open a session on the small model."""
    output = name.replace(" ", "-")
    given = settings_of(root, output, **keys)
    arguments = [
        f"--{key}={','.join(value) if isinstance(value, list) else value}"
        for key, value in given.items()
        if value is not None
    ]
    config = resolve(None, {}, arguments).config
    torch.use_deterministic_algorithms(False)  # as in a run's own process, before it loads
    return open_session(config, root / output, lambda event: print(event.to_line(), end=""))


def _try(record: Record, scale: Scale, name: str, session: TrainingSetup) -> None:
    events: list[Event] = []
    start = time.perf_counter()
    train(session.context(events.append, lambda: False), TrainState())
    wait(scale)
    finished = time.perf_counter()
    asked = evaluate.questions(session.eval_rows)
    answers = evaluate.answer(
        session.causal,
        session.tokenizer,
        asked,
        ends=session.stops,
        batch_examples=HELD_OUT,
        max_new_tokens=scale.max_new_tokens,
    )
    wait(scale)
    step = [event for event in events if isinstance(event, StepDone)][-1]
    score = [event for event in events if isinstance(event, Evaluated)][-1]
    is_finite = all(math.isfinite(one) for one in (step.loss, step.grad_norm, score.eval_loss))
    used = session.plan.precision
    figures: Figures = {
        "computed in": used,
        "attention": session.plan.attention,
        "loss": step.loss,
        "gradient norm": step.grad_norm,
        "held-out loss": score.eval_loss,
        f"{STEPS} steps s": finished - start,
        "generate s": time.perf_counter() - finished,
    }
    if scale.has_gpu and "bits" not in name and used != name:
        raise RuntimeError(f"computed in {used}: {'; '.join(session.plan.reasons)}")
    verdict = criteria.works(is_finite and step.grad_norm > 0, len(answers or ()), len(asked))
    record.judge(name, figures, verdict)
