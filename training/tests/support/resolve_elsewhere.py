"""Write what the files in foreign/ mean to their own trainers: foreign/expected.json.

Run it where those trainers are importable beside torch and transformers; on a machine without a GPU
their checks of the device are answered for them, which changes no number:

    PYTHONPATH=FOLDER python resolve_elsewhere.py foreign

TRL's, LLaMA-Factory's and transformers' arguments are parsed by their own parsers, Axolotl's by its
own schema, torchtune's as its recipe reads them. Steps are counted as transformers.Trainer counts
them for ROWS rows on one device, learning rates come from transformers.get_scheduler.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, get_scheduler

ROWS = 1000
# The arguments are the same with another version of transformers than LLaMA-Factory asks for.
os.environ["DISABLE_VERSION_CHECK"] = "1"


def rates(kind: str, warmup: int, total: int, peak: float) -> list[float]:
    """Return the learning rate of the second, the middle and the last step."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_scheduler(kind, optimizer, warmup, total)
    return [peak * schedule.lr_lambdas[0](step) for step in (1, total // 2, total - 1)]


def trainer_figures(arguments: Any) -> dict[str, Any]:
    """Return the figures of transformers.Trainer for its arguments."""
    batch, accumulation = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
    )
    per_epoch = max(1, math.ceil(math.ceil(ROWS / batch) / accumulation))
    total = (
        arguments.max_steps
        if arguments.max_steps > 0
        else math.ceil(arguments.num_train_epochs * per_epoch)
    )
    warmup = arguments.get_warmup_steps(total)
    kind = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    return {
        "batch": batch * accumulation,
        "steps": total,
        "rates": rates(kind, warmup, total, arguments.learning_rate),
        "eval_batch": arguments.per_device_eval_batch_size,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "betas": [arguments.adam_beta1, arguments.adam_beta2],
        "seed": arguments.seed,
    }


def filled(kind: type, keys: dict[str, Any], **more: Any) -> Any:
    """Return a dataclass of arguments from the keys of a file, checks of the device passed."""
    names = {field.name for field in dataclasses.fields(kind)}
    known = {key: value for key, value in keys.items() if key in names}
    for key in ("bf16", "fp16", "deepspeed", "fsdp", "fsdp_config", "report_to", "tf32"):
        known.pop(key, None)
    if "warmup_ratio" in keys and "warmup_ratio" not in names and not keys.get("warmup_steps"):
        known["warmup_steps"] = keys["warmup_ratio"]  # transformers 5 takes a share there
    if "use_cpu" in names:
        known |= {"use_cpu": True, "bf16": False}
    known = {key: value for key, value in known.items() if value is not None or key == "max_length"}
    return HfArgumentParser(kind).parse_dict(known | more, allow_extra_keys=True)[0]


def of_trl(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a TRL file's figures."""
    from trl import ModelConfig, SFTConfig

    renamed = {"max_seq_length": "max_length", "torch_dtype": "dtype"}
    keys = {renamed.get(key, key): value for key, value in keys.items()}
    arguments, model = filled(SFTConfig, keys), filled(ModelConfig, keys)
    if not model.use_peft:
        return {}
    return trainer_figures(arguments) | {
        "r": model.lora_r, "alpha": model.lora_alpha, "dropout": model.lora_dropout,
        "length": arguments.max_length, "too_long": "truncate",
        "train_on": "assistant" if arguments.assistant_only_loss else "completion",
    }  # fmt: skip


def of_llamafactory(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a LLaMA-Factory file's figures."""
    from llamafactory.hparams.data_args import DataArguments
    from llamafactory.hparams.finetuning_args import FinetuningArguments

    tuning, data = filled(FinetuningArguments, keys), filled(DataArguments, keys)
    if tuning.finetuning_type != "lora":
        return {}
    train_on = "all" if data.train_on_prompt else "last" if data.mask_history else "assistant"
    return trainer_figures(filled(TrainingArguments, keys)) | {
        "r": tuning.lora_rank, "alpha": tuning.lora_alpha, "dropout": tuning.lora_dropout,
        "length": data.cutoff_len, "too_long": "truncate", "train_on": train_on,
    }  # fmt: skip


def of_axolotl(keys: dict[str, Any]) -> dict[str, Any]:
    """Return an Axolotl file's figures, as its schema and its builder have them."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    given = {key: value for key, value in keys.items() if value is not None}
    config = AxolotlInputConfig(**(given | {"deepspeed": None}))
    if not config.adapter or config.rl:
        return {}
    total = config.max_steps or math.ceil(
        config.num_epochs
        * math.ceil(ROWS / config.micro_batch_size / config.gradient_accumulation_steps)
    )
    warmup = config.warmup_steps
    if warmup is None:
        ratio = config.warmup_ratio
        warmup = min(int(0.03 * total), 100) if ratio is None else int(ratio * total)
    kind = getattr(config.lr_scheduler, "value", config.lr_scheduler)
    hf = TrainingArguments(use_cpu=True)
    beta2 = hf.adam_beta2 if config.adam_beta2 is None else config.adam_beta2
    return {
        "batch": config.micro_batch_size * config.gradient_accumulation_steps,
        "steps": total,
        "rates": rates(str(kind), warmup, total, float(config.learning_rate)),
        "warmup": warmup,
        "eval_batch": config.eval_batch_size or config.micro_batch_size,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm or hf.max_grad_norm,
        "betas": [config.adam_beta1 or hf.adam_beta1, beta2],
        "seed": config.seed or 42,
        "r": config.lora_r, "alpha": config.lora_alpha, "dropout": config.lora_dropout,
        "length": config.sequence_len, "too_long": config.excess_length_strategy or "drop",
        "train_on": "all" if config.train_on_inputs else "assistant",
    }  # fmt: skip


def of_torchtune(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a torchtune file's figures, as its recipe lora_finetune_single_device reads them."""
    model = keys["model"]
    if "lora_" not in model["_component_"]:
        return {}
    batch, accumulation = keys["batch_size"], keys["gradient_accumulation_steps"]
    total = ROWS // batch // accumulation * keys["epochs"]
    optimizer = keys["optimizer"]
    by_default = "alpaca" in keys["dataset"]["_component_"]
    on_input = keys["dataset"].get("train_on_input", by_default)
    warmup = keys["lr_scheduler"]["num_warmup_steps"]
    return {
        "batch": batch * accumulation,
        "steps": total,
        "rates": rates("cosine", warmup, total, float(optimizer["lr"])),
        "weight_decay": optimizer.get("weight_decay", 0.01),
        "max_grad_norm": keys.get("clip_grad_norm") or 0.0,
        "betas": optimizer.get("betas", [0.9, 0.999]),
        "r": model["lora_rank"], "alpha": model["lora_alpha"], "dropout": model["lora_dropout"],
        "length": keys["tokenizer"].get("max_seq_len"), "too_long": "truncate",
        "train_on": "all" if on_input else "assistant",
    }  # fmt: skip


def of_transformers(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a dump of TrainingArguments beside keys of peft.LoraConfig."""
    if "lora_alpha" not in keys:
        return {}
    return trainer_figures(filled(TrainingArguments, keys)) | {
        "r": keys.get("r", keys.get("lora_r")), "alpha": keys["lora_alpha"],
        "dropout": keys["lora_dropout"],
    }  # fmt: skip


READERS = {
    "axolotl": of_axolotl, "factory": of_llamafactory, "torchtune": of_torchtune,
    "trainer": of_transformers, "trl": of_trl,
}  # fmt: skip


def main(folder: Path) -> None:
    """Write the table; an empty entry is a file that asks for something else than LoRA."""
    loader = yaml.SafeLoader
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # 2e-4, text to YAML 1.1
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    table = {}
    for path in sorted(folder.glob("*-*.*")):
        keys = yaml.load(path.read_text(), loader)
        table[path.name] = READERS[path.name.split("-")[0]](keys)
        print(path.name, len(table[path.name]))
    lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in table.items())
    (folder / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
