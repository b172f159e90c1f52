"""The meaning of keys and values of Axolotl, LLaMA-Factory, TRL and Transformers.

Every key passes through `interpret`, this trainer's own too: it maps a key and its value to a leaf
with a value, to nothing (it asks for the default behaviour), or to an error that names the
equivalent to use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .aliases import ALIASES, COMMA_LISTS
from .dataset_entries import (
    PART_OF_SPLIT,
    WHOLE_SPLIT,
    normalise_datasets,
    unreadable_datasets,
)
from .other_keys import KERNEL_PLUGINS, REMEDIES, no_meaning
from .other_values import (
    FAMILY_TEMPLATES,
    FLASH,
    OPTIMIZERS,
    OTHER_TRACKERS,
    PRECISIONS,
    SCHEDULES,
    SHIPPED,
)
from .schema import SECRET_KEYS
from .sections import leaf_sections, sections

NAMES = re.compile(r"\s*[\w.\-]+(\s*,\s*[\w.\-]+)*\s*")
OWN_TEMPLATE = re.compile(r"tokenizer_default(_fallback_\w+)?")  # Axolotl's
PLACEHOLDER = re.compile(r"<[\w -]+>")
GROUPED = re.compile(r"\d{1,3}(_\d{3})+")  # 20_000
TEMPLATE_NAME = re.compile(r"\w[\w\-]*")
DATASETS = ("dataset", "eval_dataset")
EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Means:
    """The key sets this leaf to this value."""

    leaf: str
    value: Any


@dataclass(frozen=True, slots=True)
class Ignored:
    """The key has no effect; with a reason, that is reported."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """The key asks for something that is not supported."""

    why: str
    remedy: str = ""
    leaf: str = ""


Meaning = Means | Ignored | Refused
ANY = None
OWN_TOKENS = "the tokenizer's own special tokens are used"
SHARED = (
    "parallelism: auto shares the model among the GPUs where one cannot hold it; parallelism: fsdp "
    "and deepspeed always do"
)

# key -> the values that ask for the default behaviour (ANY: all values), and the reason.
NO_MEANING: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "adapter": (("lora", "qlora"), "training is always LoRA; use_4bit makes it QLoRA"),
    "finetuning_type": (("lora",), "training is always LoRA"),
    "peft_type": (("LORA",), "training is always LoRA"),
    "use_peft": ((True, False), "training is always LoRA"),
    "task_type": (("CAUSAL_LM",), "only causal language models are trained"),
    "bias": (("none",), "biases are not trained"),
    "stage": (("sft",), "supervised fine-tuning only, no preference training"),
    "rl": ((), "supervised fine-tuning only, no preference training"),
    "log_level": (ANY, "the console shows the run; library output goes to train.log"),
    "log_level_replica": (ANY, "the console shows the run; library output goes to train.log"),
    "disable_tqdm": (ANY, "progress is shown on one line in a terminal, as log lines elsewhere"),
    "strict": (ANY, "unknown keys are always errors"),
    "loss_watchdog_threshold": (ANY, "a loss that is not finite ends the run"),
    "loss_watchdog_patience": (ANY, "a loss that is not finite ends the run"),
    "local_rank": (ANY, "nproc sets the number of processes"),
    "ddp_find_unused_parameters": (ANY, "gradients are summed without a wrapper"),
    "dataloader_pin_memory": (ANY, "batches come from memory-mapped files"),
    "dataloader_prefetch_factor": (ANY, "batches come from memory-mapped files"),
    "dataloader_drop_last": ((False,), "every row is used"),
    "shuffle_merged_datasets": ((True,), "rows are shuffled each epoch"),
    "include_num_input_tokens_seen": (ANY, "tokens are always counted"),
    "include_tokens_per_second": (ANY, "tokens per second are always shown"),
    "xformers_attention": (ANY, "the fastest exact attention is used"),
    "sdp_attention": (ANY, "the fastest exact attention is used"),
    "s2_attention": ((False,), "attention is exact"),
    "gc_steps": (ANY, "memory is released when it runs out"),
    "eval_table_size": ((0,), "use sample_count"),
    "unfrozen_parameters": ((), "the base model stays frozen"),
    "use_tensorboard": ((True,), "use report_to: tensorboard"),
    "do_train": ((True, False), "the command selects what to do"),
    "do_eval": (ANY, "eval_dataset, eval_fraction and eval_steps control evaluation"),
    "overwrite_output_dir": (ANY, "resume and on_finished control what happens to earlier results"),
    "overwrite_cache": (ANY, "tokenized data is cached by content"),
    "resume_from_checkpoint": (
        (True, False),
        "a run resumes from its own checkpoints; to start over, use resume: never",
    ),
    "auto_resume_from_checkpoints": ((True,), "resume: auto already does this"),
    "packing": (ANY, "examples are concatenated without padding and never see one another"),
    "sample_packing": (ANY, "examples are concatenated without padding"),
    "eval_sample_packing": (ANY, "examples are concatenated without padding"),
    "pad_to_sequence_len": (ANY, "examples are concatenated without padding"),
    "group_by_length": (ANY, "without padding it would save nothing"),
    "tf32": (ANY, "the precision is chosen by measurement"),
    "eval_strategy": (("steps",), "eval_steps or evals_per_epoch says when"),
    "evaluation_strategy": (("steps",), "eval_steps or evals_per_epoch says when"),
    "save_strategy": (("steps",), "save_steps or saves_per_epoch says when"),
    "logging_strategy": (ANY, "logging_steps says when"),
    "logging_dir": (ANY, "logs are written to the output folder"),
    "logging_first_step": (ANY, "use logging_steps"),
    "plot_loss": (ANY, "the loss is always plotted"),
    "save_safetensors": ((True,), "weights are always saved as safetensors"),
    "save_only_model": (ANY, "checkpoints can always be resumed from"),
    "metric_for_best_model": (
        ("eval_loss", "loss"),
        "the best checkpoint has the lowest eval_loss",
    ),
    "greater_is_better": ((False,), "the best checkpoint has the lowest eval_loss"),
    "model_type": (ANY, "the model's own files define it"),
    "tokenizer_type": (ANY, "the model's own files define it"),
    "special_tokens": (ANY, OWN_TOKENS),
    "eos_token": (ANY, OWN_TOKENS),
    "pad_token": (ANY, OWN_TOKENS),
    "tokens": (([],), "no tokens are added; the tokenizer's own are used"),
    "roles_to_train": ((["assistant"],), "use train_on"),
    "train_on_eos": (("turn",), "the end of every trained turn is trained"),
    "bnb_4bit_compute_dtype": (ANY, "use bf16 and fp16"),
    "quantization_method": (("bnb", "bitsandbytes"), "bitsandbytes quantizes"),
    "gradient_checkpointing_kwargs": (ANY, "the variant is chosen automatically"),
    "dataloader_num_workers": (ANY, "batches come from memory-mapped files"),
    "remove_unused_columns": (ANY, "only the columns of the row format are read"),
    "ddp_timeout": (ANY, "use stall_timeout_seconds"),
    "deepspeed": (ANY, SHARED),
    "fsdp": (ANY, SHARED),
    "fsdp_config": (ANY, SHARED),
    "wandb_project": (ANY, "set the environment variable WANDB_PROJECT"),
    "wandb_entity": (ANY, "set the environment variable WANDB_ENTITY"),
    "wandb_name": (ANY, "trackers show run_name"),
    "wandb_run_id": (ANY, "set the environment variable WANDB_RUN_ID"),
    "wandb_offline": (ANY, "set the environment variable WANDB_MODE"),
    "wandb_mode": (ANY, "set the environment variable WANDB_MODE"),
    "wandb_watch": (ANY, "trackers log metrics, not weights"),
    "wandb_log_model": (ANY, "nothing is uploaded; the model stays in the output folder"),
    "push_to_hub": (ANY, "nothing is pushed; results stay in the output folder"),
    "hub_model_id": (ANY, "nothing is pushed; results stay in the output folder"),
    "hub_strategy": (ANY, "nothing is pushed; results stay in the output folder"),
    "neftune_noise_alpha": ((0, False), "noisy embeddings are not supported"),
    "plugins": ((), "only the plugins for kernels are known"),
    "peft": ((), "LoftQ is the only one of its settings that is supported"),
    "pissa_iter": (
        ANY,
        "in a file of LLaMA-Factory it is part of pissa_init; elsewhere write "
        "init_lora_weights: pissa_niter_16",
    ),
    **no_meaning(),
}

STRATEGIES = {
    "save_strategy": ("saves_per_epoch", "save_steps"),
    "eval_strategy": ("evals_per_epoch", "eval_steps"),
    "evaluation_strategy": ("evals_per_epoch", "eval_steps"),
}
# Numbers of steps that may be a fraction of all steps elsewhere.
OF_ALL_STEPS = {
    "warmup_steps": "warmup_ratio",
    "eval_steps": "evals_per_epoch",
    "save_steps": "saves_per_epoch",
}
DTYPES = {**PRECISIONS, "float16": Means("fp16", True), "fp16": Means("fp16", True)}


def interpret(key: str, value: Any) -> Meaning | None:
    """Return the meaning of a key and its value; None for an unknown key."""
    leaf = ALIASES.get(key, key)
    if key in STRATEGIES and value in ("no", False, "epoch"):
        per_epoch, steps = STRATEGIES[key]
        return Means(per_epoch, 1) if value == "epoch" else Means(steps, 0)
    if key == "plugins" and isinstance(value, list):
        return _plugins(value)
    if key in NO_MEANING:
        return _judge(key, value)
    if leaf not in leaf_sections():
        return None
    if value is None:
        return Means(leaf, None)
    if key == "template" and isinstance(value, str) and TEMPLATE_NAME.fullmatch(value):
        exactly = f"chat_template: {value} writes LLaMA-Factory's" if value in SHIPPED else ""
        other = exactly or "chat_template takes another"
        return Ignored(f"the tokenizer's own chat template is used; {other}")
    if key == "chat_template" and isinstance(value, str) and value in FAMILY_TEMPLATES:
        return Ignored("the tokenizer's own chat template is used, as its model's family has it")
    if key == "attn_implementation" and isinstance(value, str) and "/" in value:
        return Ignored("fast exact kernels are chosen for you")
    if leaf in SECRET_KEYS and isinstance(value, str) and PLACEHOLDER.fullmatch(value):
        return Ignored("it contains a placeholder")
    if leaf == "dataset_split" and "[" in str(value):
        return Refused(f"it is a {PART_OF_SPLIT}", WHOLE_SPLIT)
    if leaf in DATASETS and (unreadable := unreadable_datasets(value)):
        return Refused(*unreadable)
    if leaf == "report_to":
        return _report_to(normalise(leaf, value))
    if key in CONVERSIONS:
        meaning = CONVERSIONS[key](value)
        return meaning if isinstance(meaning, Meaning) else Means(leaf, meaning)
    if key in ("val_set_size", "val_size") and type(value) in (int, float) and value > 1:
        return Refused(
            "a number of rows is not supported, only a fraction",
            "write a fraction such as 0.05, or set eval_dataset",
        )
    if key in OF_ALL_STEPS and isinstance(value, float) and 0 < value < 1:
        return _fraction_of_steps(key, value)
    return Means(leaf, normalise(leaf, value))


def _fraction_of_steps(key: str, value: float) -> Meaning:
    """Interpret a number of steps under 1, which transformers and Axolotl take as a fraction."""
    if key == "warmup_steps":
        return Means("warmup_ratio", value)
    per_epoch = OF_ALL_STEPS[key]
    times = "once" if value > 0.5 else f"{round(1 / value)} times"
    return Refused(
        "a fraction of all steps is not supported",
        f"write a number of steps, or {per_epoch} (here {times} in all epochs together)",
    )


def _judge(key: str, value: Any) -> Meaning:
    fine, reason = NO_MEANING[key]
    if key == "stage" and value == "pt":
        return Refused(
            "plain text is trained as a dataset of format text", REMEDIES["pretraining_dataset"]
        )
    if value in EMPTY:
        return Ignored()
    if fine is ANY or value in fine:
        return Ignored(reason)
    return Refused(reason, REMEDIES.get(key, f"remove {key}"))


def normalise(leaf: str, value: Any) -> Any:
    """Return a leaf's value in its canonical spelling."""
    if leaf in COMMA_LISTS and isinstance(value, str):
        return _list_of(leaf, value)
    if isinstance(value, str) and GROUPED.fullmatch(value) and _is_number(leaf):
        return int(value)
    if leaf == "lora_target_modules" and value in (["all-linear"], ["all"]):
        return "all-linear"
    if leaf in DATASETS:
        return normalise_datasets(value)
    if leaf == "chat_template" and isinstance(value, str) and OWN_TEMPLATE.fullmatch(value):
        return None
    if leaf == "gradient_checkpointing" and value in ("offload", "offload_disk", "unsloth"):
        return True  # where the activations are kept changes no number
    if leaf == "optim" and isinstance(value, str):
        return OPTIMIZERS.get(value, value)
    if leaf == "lr_scheduler_type" and isinstance(value, str):
        return SCHEDULES.get(value, value)
    return value


def _is_number(leaf: str) -> bool:
    default = sections()[leaf_sections()[leaf]].model_fields[leaf].default
    return type(default) in (int, float)


def _list_of(leaf: str, text: str) -> str | list[str]:
    if leaf == "report_to" and text in ("", "none"):
        return []
    if leaf == "lora_target_modules" and text in ("all", "all-linear"):
        return "all-linear"
    if leaf == "lora_target_modules" and not NAMES.fullmatch(text):
        return text  # PEFT treats it as a regular expression
    return [part.strip() for part in text.split(",") if part.strip()]


def _one_of(values: dict[str, Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in values:
            return values[value]
        return Refused(f"it takes {', '.join(values)}")

    return convert


def _switch(when_true: Any, when_false: Any = None) -> Callable[[Any], Any]:
    """Return a converter for true/false values; None leaves the leaf unset."""

    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            return Refused("it takes true or false")
        chosen = when_true if value else when_false
        return Ignored() if chosen is None else chosen

    return convert


def _report_to(names: Any) -> Meaning:
    others = [name for name in names if name in OTHER_TRACKERS] if isinstance(names, list) else []
    if not others:
        return Means("report_to", names)
    if kept := [name for name in names if name not in others]:
        return Refused(f"{others[0]} is no tracker that is supported", f"write report_to: {kept}")
    return Ignored("it takes tensorboard, mlflow, trackio and wandb")


def _quantization_bit(value: Any) -> Meaning:
    if value in (4, 8) and type(value) is int:
        return Means(f"use_{value}bit", True)
    return Refused("it takes 4 or 8")


def _plugins(names: list[Any]) -> Meaning:
    if all(any(known in str(name) for known in KERNEL_PLUGINS) for name in names):
        return Ignored("fast exact kernels are chosen for you")
    return Refused("only the plugins for kernels are known", REMEDIES["plugins"])


def _too_long(value: Any) -> Any:
    meant = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    is_known = isinstance(value, str) and value in meant
    return meant[value] if is_known else Refused("it takes drop, truncate or raise")


def _text_column(value: Any) -> Any:
    if value == "text":
        return Ignored()  # the column that is read anyway
    return {"text": value} if isinstance(value, str) else Refused("it takes a column's name")


def _schedule_options(value: Any) -> Any:
    if not value:
        return Ignored()
    if isinstance(value, dict) and set(value) == {"min_lr_rate"}:
        return value["min_lr_rate"]
    is_least = isinstance(value, dict) and "min_lr" in value
    return Refused(
        "of a schedule's options only min_lr_rate is supported",
        "write min_lr_rate, which is min_lr divided by learning_rate"
        if is_least
        else "remove lr_scheduler_kwargs",
    )


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "assistant_only_loss": _switch("assistant", "completion"),
    "completion_only_loss": _switch("completion", "all"),
    "excess_length_strategy": _too_long,
    "bfloat16": _switch(True),
    "float16": _switch(Means("fp16", True)),
    "float32": _switch(False),
    "attn_implementation": _one_of(FLASH),
    "dataset_text_field": _text_column,
    "disable_gradient_checkpointing": _switch(False),
    "dtype": _one_of(DTYPES),
    "flash_attn": _one_of(FLASH),
    "lora_target_linear": _switch("all-linear"),
    "lr_scheduler_kwargs": _schedule_options,
    "mask_history": _switch("last"),
    "pissa_init": _switch("pissa"),
    "quantization_bit": _quantization_bit,
    "torch_dtype": _one_of(DTYPES),
    "train_on_inputs": _switch("all", "assistant"),
    "train_on_prompt": _switch("all", "assistant"),
}
