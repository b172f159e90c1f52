"""Config files of other trainers, read with the defaults of their own trainer.

A file that leaves a key out means its trainer's default, not ours: `lora_rank: 8` without an alpha
is a scale of 16 in LLaMA-Factory. `recognise` tells whose file it is by its keys; `complete` adds
what it leaves out; `settle` reads what depends on several keys. Sources: axolotl/utils/schemas and
core/builders, llamafactory/hparams, trl.SFTConfig and trl.ModelConfig,
transformers.TrainingArguments, torchtune's recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from . import dataset_mixtures, torchtune
from .aliases import ALIASES
from .dataset_info import read_names
from .layers import Given, Layer, Origin
from .paths import absolute, exists

LORA_RATE = "a learning rate for LoRA, such as 2e-4"
UNLIMITED = 1_048_576  # the most that max_seq_length takes
Values = Mapping[str, Any]
LORA_KEYS = frozenset({"lora_r", "lora_rank", "lora_alpha", "r", "peft_type", "use_peft"})


@dataclass(frozen=True, slots=True)
class Trainer:
    """Another trainer: how to recognise its files, and its defaults.

    `name` is what --config_format calls it. `telltales`: all keys of one of the sets are in no
    other trainer's file. `defaults` takes the leaves that a file gives and its own keys. `is_full`
    tells from the file's keys whether all weights are to be trained. `reads`: keys that `settle`
    takes together.
    """

    name: str
    title: str
    telltales: tuple[frozenset[str], ...]
    defaults: Callable[[Values, Values], dict[str, Any]]
    is_full: Callable[[Values], bool]
    lora: str
    differs: str
    reads: frozenset[str] = frozenset()


def _per_epoch(values: Values, keys: Values, logging_steps: int) -> dict[str, Any]:
    """Return how often the Trainer of transformers saves and evaluates where a file is silent."""
    strategy = keys.get("eval_strategy", keys.get("evaluation_strategy"))
    is_in_steps = strategy == "steps" and "evals_per_epoch" not in values
    steps = {"eval_steps": values.get("logging_steps", logging_steps)} if is_in_steps else {}
    return steps | {"save_steps": 500, "logging_steps": logging_steps}


def _axolotl(values: Values, _: Values) -> dict[str, Any]:
    return {
        "lora_dropout": 0.0,
        "max_seq_length": 512,
        "too_long": "drop",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": values.get("per_device_train_batch_size", 1),
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "saves_per_epoch": 1,
        "report_to": [],
    }


def _hugging_face(values: Values, keys: Values, logging_steps: int = 500) -> dict[str, Any]:
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
        "report_to": [],
    } | _per_epoch(values, keys, logging_steps)


def _peft(values: Values, keys: Values) -> dict[str, Any]:
    """Return the defaults of a Trainer whose model peft.LoraConfig adapts."""
    lora = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "train_on": "all"}
    return _hugging_face(values, keys) | lora


def _llama_factory(values: Values, keys: Values) -> dict[str, Any]:
    rank = values.get("lora_r", 8)
    alpha = {"lora_alpha": 2 * rank} if isinstance(rank, int | float) else {}
    own = {"lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    return _hugging_face(values, keys) | own | alpha | {"max_seq_length": 2048}


def _trl(values: Values, keys: Values) -> dict[str, Any]:
    has_limit = keys.get("max_length", keys.get("max_seq_length", 0)) is not None
    return _hugging_face(values, keys, logging_steps=10) | {
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],  # PEFT's for Llama, Mistral, Qwen and Gemma
        "learning_rate": 2e-5,
        "max_seq_length": 1024 if has_limit else UNLIMITED,
        "train_on": "completion",
    }


def _torchtune(_: Values, keys: Values) -> dict[str, Any]:
    schedule = "cosine" if keys.get("lr_scheduler") else "constant"
    return {
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "gradient_accumulation_steps": 1,
        "max_seq_length": UNLIMITED,
        "weight_decay": 0.01,  # that of torch.optim.AdamW
        "max_grad_norm": 0.0,
        "lr_scheduler_type": schedule,
        "warmup_steps": 0,
        "saves_per_epoch": 1,
    }


TRAINERS = (
    Trainer(
        "torchtune",
        "torchtune",
        (),  # by its components
        _torchtune,
        torchtune.is_full,
        "a model whose component begins with lora_",
        "the batch size counts rows, with packed too; an epoch's last, incomplete step is trained "
        "too; without a seed the seed is 42",
    ),
    Trainer(
        "axolotl",
        "Axolotl",
        (frozenset({"adapter"}), frozenset({"base_model", "datasets", "sequence_len"}),
         frozenset({"base_model", "datasets", "micro_batch_size"})),
        _axolotl,
        lambda keys: not keys.get("adapter"),
        "adapter: lora",
        "the batch sizes count rows, with sample_packing too; warmup is 3% of the steps where the "
        "file gives none, without a limit of 100, and rounded up",
    ),
    Trainer(
        "llamafactory",
        "LLaMA-Factory",
        (frozenset({"finetuning_type"}), frozenset({"stage", "cutoff_len"}),
         frozenset({"stage", "template"})),
        _llama_factory,
        lambda _: False,  # an explicit finetuning_type: full is rejected elsewhere
        "finetuning_type: lora",
        "the batch sizes count rows, with packing too; the tokenizer's own chat template is used; "
        "rows that are too long lose their end",
    ),
    Trainer(
        "trl",
        "TRL",
        (frozenset({"use_peft"}), frozenset({"dataset_name", "dataset_train_split"}),
         frozenset({"dataset_name", "dataset_text_field"}), frozenset({"dataset_mixture"}),
         frozenset({"dataset_mixer"})),
        _trl,
        lambda keys: not keys.get("use_peft"),
        "use_peft: true",
        "the batch sizes count rows, with packing too; lora_target_modules are those that PEFT "
        "chooses for Llama, Mistral, Qwen and Gemma",
        frozenset({"dataset_config", *dataset_mixtures.KEYS}),
    ),
    Trainer(
        "transformers",
        "transformers' Trainer",
        (frozenset({"lr_scheduler_kwargs", "dataloader_drop_last"}),
         frozenset({"adam_beta1", "dataloader_drop_last"}),
         frozenset({"do_train", "model_name_or_path"})),
        _peft,
        lambda keys: not LORA_KEYS & keys.keys(),
        "lora_r",
        "all tokens are trained unless train_on says otherwise",
    ),
)  # fmt: skip
FORMATS = ("own", *(trainer.name for trainer in TRAINERS))
FORMAT_KEY = "config_format"


def recognise(keys: Values, named: str = "") -> Trainer | None:
    """Return the trainer that is named, or whose file has these keys; None for one of ours."""
    if named:
        return next((trainer for trainer in TRAINERS if trainer.name == named), None)
    if torchtune.is_torchtune(keys):
        return TRAINERS[0]
    for trainer in TRAINERS:
        if any(telltale <= set(keys) for telltale in trainer.telltales):
            return trainer
    return None


def take_format(arguments: Collection[str]) -> tuple[str, list[str]]:
    """Return the value of --config_format, and the other arguments.

    Raises:
        ConfigError: it is not the name of a format.
    """
    rest, named = list(arguments), ""
    for flag in (f"--{FORMAT_KEY}", f"--{FORMAT_KEY.replace('_', '-')}"):
        for number, word in enumerate(rest):
            if word == flag or word.startswith(f"{flag}="):
                end = number + (1 if "=" in word else 2)
                named = word.partition("=")[2] or "".join(rest[number + 1 : end])
                rest[number:end] = []
                if named not in FORMATS:
                    raise ConfigError.of(
                        f"{FORMAT_KEY} cannot be {named!r}",
                        where=flag,
                        why="it says whose config file it is",
                        remedy=f"{flag} {'|'.join(FORMATS)}",
                    )
                break
    return named, rest


def complete(layer: Layer, trainer: Trainer, keys: Values, path: Path) -> None:
    """Add the trainer's defaults to a file's values, and report it once."""
    if trainer.is_full(keys):
        layer.problems.append(
            Problem(
                "full fine-tuning is not supported, only LoRA",
                str(path),
                f"a file of {trainer.title} without {trainer.lora} means full fine-tuning, whose "
                "learning rate is too low for an adapter",
                f"write {trainer.lora}, and {LORA_RATE}",
            )
        )
    values = {leaf: given.value for leaf, given in layer.given.items()}
    origin = Origin("file", f"{path}, {trainer.title}'s default")
    added = []
    defaults = trainer.defaults(values, keys)
    if "constant" in (keys.get("lr_scheduler_type"), keys.get("lr_scheduler")):
        # To transformers, only constant_with_warmup has one.
        layer.given.pop("warmup_ratio", None)
        layer.given.pop("warmup_steps", None)
        defaults = {leaf: one for leaf, one in defaults.items() if leaf != "warmup_ratio"}
        defaults["warmup_steps"] = 0
    for leaf, value in defaults.items():
        if leaf in layer.given or RIVALS.get(leaf, "") in layer.given:
            continue
        layer.given[leaf] = Given(leaf, value, origin, layer.folder)
        added.append(f"{leaf} {value}")
    layer.warnings.append(
        f"{path}: read as a file of {trainer.title}, with its defaults: {', '.join(added)}; "
        f"differences: {trainer.differs}"
    )


# A default is not added where a file gives its rival.
RIVALS = {
    "warmup_ratio": "warmup_steps", "warmup_steps": "warmup_ratio",
    "save_steps": "saves_per_epoch", "saves_per_epoch": "save_steps",
    "eval_steps": "evals_per_epoch",
}  # fmt: skip


def settle(trainer: Trainer, given: dict[str, Given], keys: Values, path: Path) -> list[Problem]:
    """Read the keys of a file that depend on others, after all sources were put together.

    Returns the problems of a file that names no model or no data, where no other source does:
    ours would train the embedded model or the demo dataset instead.
    """
    problems = []
    if trainer.name == "llamafactory":
        where, folder = str(path.parent / "data"), given.get("datasets_dir")
        if folder is not None and isinstance(folder.value, str):
            where = absolute(folder.value, folder.folder)
            if not exists(where):
                del given["datasets_dir"]  # its default is in every file
        for leaf in ("dataset", "eval_dataset"):
            problems += read_names(given, leaf, Path(where))
        _settle_pissa(given, keys)
        _settle_packing(given, keys)
    elif trainer.name == "trl":
        problems += dataset_mixtures.read(given, keys, path)
        _settle_splits(given, keys)
    return problems + _missing(trainer, given, keys, path)


def _settle_pissa(given: dict[str, Given], keys: Values) -> None:
    """Take LLaMA-Factory's number of iterations, 16 unless it says; -1 decomposes exactly."""
    init, count = given.get("init_lora_weights"), keys.get("pissa_iter", 16)
    if init is not None and init.value == "pissa" and keys.get("pissa_init") and count != -1:
        given["init_lora_weights"] = replace(init, value=f"pissa_niter_{count}")


def _settle_packing(given: dict[str, Given], keys: Values) -> None:
    """Leave the last position of a packed row free, as LLaMA-Factory does."""
    length = given.get("max_seq_length")
    if length is None or length.origin.kind != "file" or not isinstance(length.value, int):
        return
    if keys.get("packing") or keys.get("neat_packing"):
        given["max_seq_length"] = replace(length, value=length.value - 1)


def _settle_splits(given: dict[str, Given], keys: Values) -> None:
    """Take TRL's subset and test split of one dataset on the hub."""
    data, subset = given.get("dataset"), keys.get("dataset_config")
    if data is None or data.origin.kind != "file" or not isinstance(data.value, str):
        return
    entry = {"path": data.value} | ({"subset": subset} if subset else {})
    if subset:
        given["dataset"] = replace(data, value=[dict(entry)])
    is_evaluated = keys.get("eval_strategy", "no") not in ("no", False)
    is_local = exists(absolute(data.value, data.folder)) or "." in data.value
    if is_evaluated and not is_local and not {"eval_dataset", "eval_fraction"} & given.keys():
        entry["split"] = keys.get("dataset_test_split") or "test"
        given["eval_dataset"] = replace(data, leaf="eval_dataset", value=[entry])


def _missing(
    trainer: Trainer, given: Mapping[str, Given], keys: Values, path: Path
) -> list[Problem]:
    # What is named and refused has its own problem.
    named = {ALIASES.get(key, key) for key, value in keys.items() if value}
    named |= {"dataset" for key in dataset_mixtures.KEYS if keys.get(key)}
    return [
        Problem(
            f"{path.name} does not name a {what}",
            str(path),
            f"a file of {trainer.title} has to, and the default job's is not meant",
            f"--{leaf} {example}",
        )
        for leaf, what, example in (
            ("model_name_or_path", "base model", "FOLDER_OR_HUB_ID"),
            ("dataset", "dataset", "FILE_OR_HUB_ID"),
        )
        if leaf not in given and leaf not in named
    ]
