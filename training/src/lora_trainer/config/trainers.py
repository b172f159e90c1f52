"""Config files of Axolotl, LLaMA-Factory and TRL, read with the defaults of their own trainer.

A file that leaves a key out means its trainer's default, not ours: `lora_rank: 8` without an alpha
is a scale of 16 in LLaMA-Factory. `recognise` tells whose file it is by its keys; `complete` adds
what it leaves out. Sources: axolotl/utils/schemas, llamafactory/hparams, trl.SFTConfig and
trl.ModelConfig, transformers.TrainingArguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem
from .layers import Given, Layer, Origin

LORA_RATE = "a learning rate for LoRA, such as 2e-4"


@dataclass(frozen=True, slots=True)
class Trainer:
    """Another trainer: how its files are known, and what they mean.

    `telltales`: any of these keys, or all keys of one of the sets, is in no other trainer's file.
    `is_full` tells from the file's keys whether all weights are to be trained.
    """

    name: str
    telltales: tuple[frozenset[str], ...]
    defaults: Callable[[Mapping[str, Any]], dict[str, Any]]
    is_full: Callable[[Mapping[str, Any]], bool]
    lora: str
    differs: str


def _axolotl(values: Mapping[str, Any]) -> dict[str, Any]:
    batch = values.get("per_device_train_batch_size", 1)
    return {
        "lora_dropout": 0.0,
        "max_seq_length": 512,
        "too_long": "drop",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
    }


def _hugging_face(_: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of transformers.TrainingArguments."""
    return {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }


def _llama_factory(values: Mapping[str, Any]) -> dict[str, Any]:
    rank = values.get("lora_r", 8)
    alpha = {"lora_alpha": 2 * rank} if isinstance(rank, int | float) else {}
    own = {"lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    return _hugging_face(values) | own | alpha | {"max_seq_length": 2048}


def _trl(values: Mapping[str, Any]) -> dict[str, Any]:
    return _hugging_face(values) | {
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],  # PEFT's for Llama, Mistral, Qwen and Gemma
        "learning_rate": 2e-5,
        "max_seq_length": 1024,
        "train_on": "all",
    }


TRAINERS = (
    Trainer(
        "Axolotl",
        (frozenset({"adapter"}), frozenset({"base_model", "datasets", "sequence_len"}),
         frozenset({"base_model", "datasets", "micro_batch_size"})),
        _axolotl,
        lambda keys: not keys.get("adapter"),
        "adapter: lora",
        "rows of type alpaca become chat turns; warmup is 3% of the steps, without a limit of 100",
    ),
    Trainer(
        "LLaMA-Factory",
        (frozenset({"finetuning_type"}), frozenset({"stage", "cutoff_len"}),
         frozenset({"stage", "template"})),
        _llama_factory,
        lambda _: False,  # finetuning_type: full is refused where it stands
        "finetuning_type: lora",
        "the tokenizer's own chat template is used",
    ),
    Trainer(
        "TRL",
        (frozenset({"use_peft"}), frozenset({"dataset_name", "dataset_train_split"}),
         frozenset({"dataset_name", "dataset_text_field"})),
        _trl,
        lambda keys: not keys.get("use_peft"),
        "use_peft: true",
        "train_on: all is meant for conversations; TRL trains the completion alone where rows have "
        "a prompt and a completion: --train_on assistant",
    ),
)  # fmt: skip


def recognise(keys: Collection[str]) -> Trainer | None:
    """Return the trainer whose file has these keys at its top level; None for one of ours."""
    for trainer in TRAINERS:
        if any(mark <= set(keys) for mark in trainer.telltales):
            return trainer
    return None


def complete(layer: Layer, trainer: Trainer, keys: Mapping[str, Any], path: Path) -> None:
    """Add the trainer's defaults to what a file gives, and say so once."""
    if trainer.is_full(keys):
        layer.problems.append(
            Problem(
                "full fine-tuning is not supported, only LoRA",
                str(path),
                f"a {trainer.name} file without {trainer.lora} trains all weights, with a "
                "learning rate that is too low for an adapter",
                f"write {trainer.lora}, and {LORA_RATE}",
            )
        )
    values = {leaf: given.value for leaf, given in layer.given.items()}
    origin = Origin("file", f"{path}, {trainer.name}'s default")
    added = []
    for leaf, value in trainer.defaults(values).items():
        if leaf in layer.given or (leaf == "warmup_ratio" and "warmup_steps" in layer.given):
            continue
        layer.given[leaf] = Given(leaf, value, origin, layer.folder)
        added.append(f"{leaf} {value}")
    layer.warnings.append(
        f"{path}: read as a file of {trainer.name}, with its defaults: {', '.join(added)}; "
        f"what differs: {trainer.differs}"
    )


def missing(trainer: Trainer, given: Mapping[str, Given], path: Path) -> list[Problem]:
    """Return the problems of a file that names no model or no data, where no other source does.

    Ours would train the embedded model or the demo dataset instead.
    """
    return [
        Problem(
            f"{path.name} names no {what}",
            str(path),
            f"a file of {trainer.name} has to, and the default job's is not meant",
            f"--{leaf} {example}",
        )
        for leaf, what, example in (
            ("model_name_or_path", "base model", "FOLDER_OR_HUB_ID"),
            ("dataset", "dataset", "FILE_OR_HUB_ID"),
        )
        if leaf not in given
    ]
