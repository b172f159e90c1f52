"""Config files of torchtune: keys in nested components, brought to keys of the top level.

A component is named by `_component_`, a dotted path. What it means here stands in `COMPONENTS`,
what its keys mean in `KEYS`. Source: torchtune's recipes and their builders' signatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Problem
from .layers import Layer, did_you_mean
from .text import Document, Pointer

NAME = "_component_"
MLP = ("gate_proj", "up_proj", "down_proj")
MODULES = {"output_proj": "o_proj"}
PREFERENCES = "remove loss, or train preferences elsewhere, such as with TRL"
KEYS = {
    "model": {
        "lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "use_dora": "use_dora",
    },
    "tokenizer": {"max_seq_len": "max_seq_length"},
    "checkpointer": {"checkpoint_dir": "model_name_or_path"},
    "optimizer": {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"},
    "lr_scheduler": {"num_warmup_steps": "warmup_steps"},
}  # fmt: skip
# Their other keys change no number, or are read as a whole.
WITHOUT_EFFECT = {
    "model": ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output", "quantize_base"),
    "tokenizer": ("path", "merges_file", "merges_path", "vocab_path", "prompt_template",
                  "truncation_type"),
    "checkpointer": ("checkpoint_files", "output_dir", "model_type", "adapter_checkpoint",
                     "recipe_checkpoint", "safe_serialization", "safetensor_format"),
    "optimizer": ("fused", "foreach", "betas"),
    "lr_scheduler": ("num_cycles",),
    "loss": ("num_output_chunks", "ignore_index", "tp_enabled"),
}  # fmt: skip
TOP = {
    "epochs": "num_train_epochs", "clip_grad_norm": "max_grad_norm",
    "enable_activation_checkpointing": "gradient_checkpointing",
    "batch_size": "per_device_train_batch_size",
    "batch_size_val": "per_device_eval_batch_size",
    "run_val_every_n_steps": "eval_steps",
}  # fmt: skip
DATASETS = {"dataset": "dataset", "dataset_val": "eval_dataset"}
OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
}
SCHEDULES = {"get_cosine_schedule_with_warmup": "cosine"}
TRACKERS = {"WandBLogger": ["wandb"], "TensorBoardLogger": ["tensorboard"]}
# The tokenizers that write no turns around a prompt.
WITHOUT_TURNS = ("llama2_tokenizer", "gemma_tokenizer")
ALPACA = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
DATASET_KEYS = (
    NAME, "source", "data_files", "split", "subset", "name", "packed", "train_on_input", "column",
    "column_map", "conversation_column", "conversation_style", "add_eos", "filter_fn",
    "new_system_prompt",
)  # fmt: skip
REFUSED_DATASET_KEYS = {
    "filter_fn": ("no code of a config file is run", "filter the rows beforehand and remove it"),
    "new_system_prompt": (
        "system prompts come from the rows",
        "add a system turn, or a system field, to the rows and remove it",
    ),
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a file, as it is at the top level here, and where it stands there."""

    name: str
    value: Any
    pointer: Pointer


def is_torchtune(keys: Mapping[str, Any]) -> bool:
    """Return whether a file has torchtune's components."""
    return any(isinstance(value, Mapping) and NAME in value for value in keys.values())


def component(keys: Mapping[str, Any], section: str) -> str:
    """Return the last word of a component's path; empty where there is none."""
    value = keys.get(section)
    return str(value.get(NAME, "")).rpartition(".")[2] if isinstance(value, Mapping) else ""


def is_full(keys: Mapping[str, Any]) -> bool:
    """Return whether all weights of the model are trained."""
    return "lora_" not in component(keys, "model")


def take(layer: Layer, document: Document) -> None:
    """Add what a file of torchtune gives to a layer."""
    keys: Mapping[str, Any] = document.value
    for key in _keys_of(keys, layer, document):
        location = document.location(key.pointer)
        layer.add(key.name, key.value, location, document=document, pointer=key.pointer)


def _keys_of(keys: Mapping[str, Any], layer: Layer, document: Document) -> Iterator[Key]:
    for section, value in keys.items():
        at = (section,)
        if section in ("profiler", "metric_logger"):
            name = component(keys, section)
            if section == "metric_logger":
                yield Key("report_to", TRACKERS.get(name, []), at)
        elif section in DATASETS:
            yield from _dataset(section, keys, value, layer, document)
        elif isinstance(value, Mapping) and section in WITHOUT_EFFECT:
            yield from _component(section, value, layer, document)
        else:
            yield Key(TOP.get(section, section), value, at)


def _component(
    section: str, value: Mapping[str, Any], layer: Layer, document: Document
) -> Iterator[Key]:
    known = {**KEYS.get(section, {}), **dict.fromkeys(WITHOUT_EFFECT[section], ""), NAME: ""}
    for key, inner in value.items():
        at = (section, key)
        if key not in known:
            remedy = did_you_mean(key, known, lambda name: f"{section}.{name}")
            what = f"{section}.{key} is an unknown key"
            layer.problems.append(Problem(what, document.location(at), remedy=remedy))
        elif known[key]:
            yield Key(known[key], inner, at)
    yield from _meaning(section, value, layer, document)


def _meaning(
    section: str, value: Mapping[str, Any], layer: Layer, document: Document
) -> Iterator[Key]:
    """Yield what a component means as a whole."""
    path = str(value.get(NAME, ""))
    name, at = path.rpartition(".")[2], (section, NAME)
    if section == "model":
        if targets := _targets(value):
            yield Key("lora_target_modules", targets, (section, "lora_attn_modules"))
        if name.startswith("qlora_") or value.get("quantize_base"):
            yield Key("use_4bit", True, at)
    elif section == "optimizer":
        yield Key("optim", OPTIMIZERS.get(path, name), at)
        betas = value.get("betas")
        if isinstance(betas, list) and len(betas) == 2:
            yield Key("adam_beta1", betas[0], (section, "betas", 0))
            yield Key("adam_beta2", betas[1], (section, "betas", 1))
    elif section == "lr_scheduler":
        yield Key("lr_scheduler_type", SCHEDULES.get(name, name), at)
    elif section == "loss" and ".rlhf." in path:
        why = "training is always supervised fine-tuning"
        layer.problems.append(
            Problem(f"loss cannot be {name}", document.location(at), why, PREFERENCES)
        )
    elif section == "loss" and "CrossEntropy" not in name and not name.startswith("CE"):
        why = "the loss is cross entropy alone"
        layer.problems.append(
            Problem(f"loss cannot be {name}", document.location(at), why, "remove loss")
        )


def _targets(model: Mapping[str, Any]) -> Any:
    attention = model.get("lora_attn_modules") or []
    if not isinstance(attention, list):
        return attention  # for the schema to refuse
    mlp = MLP if model.get("apply_lora_to_mlp") else ()
    output = ("lm_head",) if model.get("apply_lora_to_output") else ()
    return [*(MODULES.get(str(name), str(name)) for name in attention), *mlp, *output]


def _dataset(
    section: str, keys: Mapping[str, Any], value: Any, layer: Layer, document: Document
) -> Iterator[Key]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, Mapping) and NAME in entry for entry in entries):
        yield Key(DATASETS[section], value, (section,))
        return
    datasets: list[dict[str, Any]] = []
    on_input: list[Any] = []
    for number, entry in enumerate(entries):
        at: Pointer = (section, number) if isinstance(value, list) else (section,)
        for key in entry.keys() - set(DATASET_KEYS):
            what = f"{section}.{key} is an unknown key"
            remedy = did_you_mean(key, DATASET_KEYS, lambda name: f"{section}.{name}")
            layer.problems.append(Problem(what, document.location((*at, key)), remedy=remedy))
        for key in REFUSED_DATASET_KEYS.keys() & entry.keys():
            if entry[key]:
                why, remedy = REFUSED_DATASET_KEYS[key]
                location = document.location((*at, key))
                layer.problems.append(Problem(f"{section}.{key} is set", location, why, remedy))
        meant = _entry(entry, component(keys, "tokenizer"))
        if meant is None:
            why = "its rows are written by code of torchtune"
            remedy = f"name a file or hub id: --{DATASETS[section]} FILE_OR_HUB_ID"
            what = f"{section} cannot be {str(entry[NAME]).rpartition('.')[2]}"
            layer.problems.append(Problem(what, document.location(at), why, remedy))
        else:
            datasets.append(meant)
            by_default = str(entry[NAME]).endswith(("alpaca_dataset", "alpaca_cleaned_dataset"))
            on_input.append(entry.get("train_on_input", by_default))
    if datasets:
        yield Key(DATASETS[section], datasets, (section,))
    if datasets and section == "dataset":
        yield Key("train_on", "all" if True in on_input else "assistant", ("dataset", NAME))


def _entry(entry: Mapping[str, Any], tokenizer: str) -> dict[str, Any] | None:
    """Return one dataset as an entry of ours; None where its builder is not known."""
    name = str(entry[NAME]).rpartition(".")[2]
    source, files = entry.get("source", ALPACA.get(name)), entry.get("data_files")
    path = files if source in ("json", "csv", "parquet", "text") and files else source
    subset = entry.get("name", entry.get("subset"))
    kept = {"path": path, "split": entry.get("split"), "subset": subset}
    mapping = entry.get("column_map")
    columns = mapping if isinstance(mapping, Mapping) else {}
    if name in ALPACA:
        kept["format"] = "alpaca_text" if tokenizer in WITHOUT_TURNS else "alpaca_chat"
        kept["columns"] = columns or None
    elif name == "instruct_dataset":
        kept["format"] = "alpaca"
        names = (("instruction", "input"), ("output", "output"))
        kept["columns"] = {ours: columns.get(theirs, theirs) for ours, theirs in names}
    elif name == "chat_dataset":
        style = entry.get("conversation_style", "sharegpt")
        kept["format"] = "sharegpt" if style == "sharegpt" else "messages"
        column = entry.get("conversation_column")
        field = "conversations" if style == "sharegpt" else "messages"
        kept["columns"] = {field: column} if column else None
    elif name == "text_completion_dataset":
        kept |= {"format": "text", "columns": {"text": entry.get("column", "text")}}
    else:
        return None
    return {key: value for key, value in kept.items() if value is not None}
