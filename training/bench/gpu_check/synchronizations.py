"""How often the host waits for the device in an optimizer step, counted by PyTorch."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from lora_trainer.run.events import Event, StepDone
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.loop import train

from . import criteria
from .precision import open_small, write_model
from .record import Record
from .scale import Scale

STEPS, WARMUP = 8, 3  # the first steps make the optimizer's state
COUNTED = STEPS - 1 - WARMUP  # nor does the last one count: the end saves a checkpoint
PLACES = 6


def run(record: Record, scale: Scale) -> None:
    """Train with PyTorch's warnings of each synchronization, in bfloat16 and in 4 bits."""
    from lora_trainer.model import quantize

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root, scale)
        for name, keys in {"bfloat16": {}, "4 bits": {"use_4bit": True}}.items():
            if keys and not quantize.installed_version():
                record.skip(name, quantize.NOT_INSTALLED)
                continue
            with record.attempt(name):
                places = count_places(root, name, scale, **keys)
                if not scale.has_gpu:
                    record.skip(name, f"{STEPS} steps ran; only a GPU is waited for")
                    continue
                each_step = sum(places.values()) / COUNTED
                common = places.most_common(PLACES)
                record.judge(
                    name,
                    {"a step": each_step, "at": "; ".join(f"{at} x {n}" for at, n in common)},
                    criteria.few_synchronizations(each_step),
                )


def count_places(root: Path, name: str, scale: Scale, **keys: bool) -> Counter[str]:
    """Return the places that waited, from the end of the warm-up to the last step but one."""
    session = open_small(
        root,
        name,
        **keys,
        eval_dataset=None,
        max_steps=STEPS,
        save_steps=0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    places: Counter[str] = Counter()

    def emit(event: Event) -> None:
        if scale.has_gpu and isinstance(event, StepDone):
            is_counted = WARMUP <= event.step < STEPS - 1
            torch.cuda.set_sync_debug_mode("warn" if is_counted else "default")

    def count(message: object, _category: object, file: str, line: int, *_: object) -> None:
        # PyTorch also warns that this mode is a prototype, once, when it is switched on.
        if "synchroniz" in str(message) and "prototype" not in str(message):
            places[f"{Path(file).name}:{line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count  # type: ignore[assignment]
        train(session.context(emit, lambda: False), TrainState())
    return places
