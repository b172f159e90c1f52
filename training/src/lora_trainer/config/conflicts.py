"""Values that conflict with each other, and values that have no effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import Problem
from .layers import Given
from .schema import Config

Check = Callable[[Config], bool]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Keys that conflict when `applies`; the place lists those that the user set."""

    keys: tuple[str, ...]
    applies: Check
    what: str
    why: str
    remedy: str


def _is_evaluated(config: Config) -> bool:
    return config.data.eval_dataset is not None or config.data.eval_fraction > 0


def _is_evaluated_last(config: Config) -> bool:
    """Return whether evaluation is at the end only."""
    return config.training.eval_steps == config.training.evals_per_epoch == 0


def _is_quantized(config: Config) -> bool:
    return config.model.use_4bit or config.model.use_8bit


def _is_pissa(config: Config) -> bool:
    return str(config.lora.init_lora_weights).startswith("pissa")


def _changes_base(config: Config) -> bool:
    return str(config.lora.init_lora_weights).startswith(("pissa", "olora"))


def _has_two_steps(config: Config) -> bool:
    """Return whether no number of processes makes the two ways to set a step's size agree."""
    training, size = config.training, config.training.train_batch_size
    accumulation = training.gradient_accumulation_steps
    return bool(
        size and accumulation > 1 and size % (accumulation * training.per_device_train_batch_size)
    )


# A run without a name writes to the output folder itself, beside the folders of named runs.
NAMES_OF_A_RUNS_FILES = frozenset(
    {
        "checkpoints", "config.digest", "config.resolved.json", "data.json", "done",
        "environment.json", "events.jsonl", "final_model", "initial_adapter", "logs", "loss.png",
        "memory.json", "plan.json", "report.html", "results.json", "server.json", "train.log",
    }
)  # fmt: skip
AS_PARAMETERS = (
    "PEFT adapts a parameter by adding a product of matrices; nothing can be applied between them"
)
EVALUATION = ("eval_dataset", "eval_fraction")
HOLD_OUT = "set eval_dataset or eval_fraction, e.g. 0.05"
NOT_AS_TRAINED = "the converted adapter would differ from the trained one"
CONFLICTS = (
    Conflict(
        ("use_4bit", "use_8bit"),
        lambda c: c.model.use_4bit and c.model.use_8bit,
        "use_4bit and use_8bit are both true",
        "a model is loaded in a single precision",
        "turn one of them off",
    ),
    Conflict(
        ("bf16", "fp16"),
        lambda c: c.model.bf16 is True and c.model.fp16 is True,
        "bf16 and fp16 are both true",
        "a model computes in a single precision",
        "turn one of them off, or leave both at auto",
    ),
    Conflict(
        ("use_flash_attention", "bf16", "fp16"),
        lambda c: (
            c.model.use_flash_attention == "flash-attn"
            and c.model.bf16 is False
            and c.model.fp16 is not True
        ),
        "use_flash_attention: flash-attn needs bf16 or fp16",
        "flash-attn does not support float32",
        "set bf16 to auto, or use_flash_attention to true",
    ),
    Conflict(
        ("use_flash_attention", "padding_free"),
        lambda c: c.model.use_flash_attention == "flash-attn" and c.training.padding_free is False,
        "use_flash_attention: flash-attn needs padding_free",
        "flash-attn is only used on concatenated examples",
        "set padding_free to auto, or use_flash_attention to true",
    ),
    Conflict(
        ("init_lora_weights", "use_4bit", "use_8bit"),
        lambda c: _is_pissa(c) and _is_quantized(c),
        "init_lora_weights: pissa needs a model that is not quantized",
        "it decomposes the full-precision weights, which a quantized model does not have",
        "use init_lora_weights: true, or load the model unquantized",
    ),
    Conflict(
        ("init_lora_weights", "use_4bit", "use_8bit"),
        lambda c: str(c.lora.init_lora_weights).startswith("olora") and _is_quantized(c),
        "init_lora_weights: olora needs a model that is not quantized",
        "it decomposes the weights and writes them back, which would round them again",
        "use init_lora_weights: true, or load the model unquantized",
    ),
    Conflict(
        ("init_lora_weights", "use_4bit"),
        lambda c: c.lora.init_lora_weights == "loftq" and not c.model.use_4bit,
        "init_lora_weights: loftq needs use_4bit",
        "it corrects the rounding error of 4-bit weights",
        "set use_4bit: true, or use init_lora_weights: true",
    ),
    Conflict(
        ("init_lora_weights", "use_dora"),
        lambda c: c.lora.init_lora_weights == "loftq" and c.lora.use_dora,
        "init_lora_weights: loftq cannot be combined with use_dora",
        "DoRA computes its magnitudes from the rounded weights, before LoftQ corrects them",
        "turn use_dora off, or use init_lora_weights: true",
    ),
    Conflict(
        ("init_lora_weights", "modules_to_save"),
        lambda c: _changes_base(c) and bool(c.lora.modules_to_save),
        "init_lora_weights: pissa and olora cannot be combined with modules_to_save",
        NOT_AS_TRAINED,
        "remove modules_to_save, or use init_lora_weights: true",
    ),
    Conflict(
        ("init_lora_weights", "use_dora"),
        lambda c: _changes_base(c) and c.lora.use_dora,
        "init_lora_weights: pissa and olora cannot be combined with use_dora",
        NOT_AS_TRAINED,
        "turn use_dora off, or use init_lora_weights: true",
    ),
    Conflict(
        ("init_lora_weights", "lora_r"),
        lambda c: c.lora.init_lora_weights == "orthogonal" and c.lora.lora_r % 2 == 1,
        "init_lora_weights: orthogonal needs an even lora_r",
        "A takes one half of the rows of an orthogonal matrix, B the other half",
        "use an even lora_r, e.g. 16",
    ),
    Conflict(
        ("lora_target_parameters", "lora_dropout"),
        lambda c: bool(c.lora.lora_target_parameters) and c.lora.lora_dropout > 0,
        "lora_target_parameters cannot be combined with lora_dropout",
        AS_PARAMETERS,
        "--lora_dropout 0, or remove lora_target_parameters",
    ),
    Conflict(
        ("lora_target_parameters", "use_dora"),
        lambda c: bool(c.lora.lora_target_parameters) and c.lora.use_dora,
        "lora_target_parameters cannot be combined with use_dora",
        AS_PARAMETERS,
        "turn use_dora off, or remove lora_target_parameters",
    ),
    Conflict(
        ("lora_target_parameters", "init_lora_weights"),
        lambda c: (
            bool(c.lora.lora_target_parameters)
            and c.lora.init_lora_weights not in (True, False, "gaussian")
        ),
        "lora_target_parameters needs init_lora_weights: true, false or gaussian",
        "PEFT's other initializations need the weight of a linear layer",
        "use init_lora_weights: true, or remove lora_target_parameters",
    ),
    Conflict(
        ("lora_target_parameters", "use_4bit", "use_8bit"),
        lambda c: bool(c.lora.lora_target_parameters) and _is_quantized(c),
        "lora_target_parameters needs a model that is not quantized",
        "PEFT adds the adapter to the full-precision weights, which a quantized model does not "
        "have",
        "load the model unquantized, or remove lora_target_parameters",
    ),
    Conflict(
        ("adapter_name_or_path", "init_lora_weights"),
        lambda c: c.lora.adapter_name_or_path is not None and c.lora.init_lora_weights is not True,
        "adapter_name_or_path and init_lora_weights are both set",
        "training starts from the weights of that adapter",
        "remove one of the two",
    ),
    Conflict(
        ("loraplus_lr_ratio", "learning_rate"),
        lambda c: (c.lora.loraplus_lr_ratio or 0) * c.training.learning_rate > 10,
        "loraplus_lr_ratio times learning_rate is over 10",
        "the product is the learning rate of every B matrix",
        "lower one of them; a ratio of 16 with 1e-4 is usual",
    ),
    Conflict(
        EVALUATION,
        lambda c: c.data.eval_dataset is not None and c.data.eval_fraction > 0,
        "eval_dataset and eval_fraction are both set",
        "held-out rows come from a single source",
        "remove one of the two",
    ),
    Conflict(
        ("load_best_model_at_end", *EVALUATION),
        lambda c: c.training.load_best_model_at_end and not _is_evaluated(c),
        "load_best_model_at_end without held-out data",
        "the best checkpoint is the one with the lowest eval_loss",
        HOLD_OUT,
    ),
    Conflict(
        ("load_best_model_at_end", "eval_steps"),
        lambda c: c.training.load_best_model_at_end and _is_evaluated(c) and _is_evaluated_last(c),
        "load_best_model_at_end with eval_steps 0",
        "with a single evaluation there is nothing to choose from",
        "set eval_steps, e.g. to the value of save_steps",
    ),
    Conflict(
        ("early_stopping_patience", *EVALUATION),
        lambda c: c.training.early_stopping_patience > 0 and not _is_evaluated(c),
        "early_stopping_patience without held-out data",
        "it counts evaluations without a better eval_loss",
        HOLD_OUT,
    ),
    Conflict(
        ("early_stopping_patience", "eval_steps"),
        lambda c: (
            c.training.early_stopping_patience > 0 and _is_evaluated(c) and _is_evaluated_last(c)
        ),
        "early_stopping_patience with eval_steps 0",
        "with a single evaluation at the end, nothing can stop early",
        "set eval_steps, e.g. to the value of save_steps",
    ),
    Conflict(
        ("eval_generate", *EVALUATION),
        lambda c: c.training.eval_generate and not _is_evaluated(c),
        "eval_generate without held-out data",
        "it generates answers to held-out prompts",
        HOLD_OUT,
    ),
    Conflict(
        ("use_dora", "parallelism"),
        lambda c: c.lora.use_dora and c.training.parallelism == "deepspeed",
        "use_dora cannot be combined with parallelism: deepspeed",
        "DoRA reads a frozen weight outside its layer, after DeepSpeed has released it",
        "--parallelism fsdp, or turn use_dora off",
    ),
    Conflict(
        ("lora_target_parameters", "parallelism"),
        lambda c: bool(c.lora.lora_target_parameters) and c.training.parallelism == "deepspeed",
        "lora_target_parameters cannot be combined with parallelism: deepspeed",
        "the tensor and its adapter are added outside the layer that DeepSpeed gathers",
        "--parallelism fsdp, or remove lora_target_parameters",
    ),
    Conflict(
        ("offload_param_device", "parallelism"),
        lambda c: (
            c.training.offload_param_device != "none" and c.training.parallelism != "deepspeed"
        ),
        "offload_param_device without parallelism: deepspeed",
        "only DeepSpeed can move layers from host memory to the GPU",
        "--parallelism deepspeed",
    ),
    Conflict(
        ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
        _has_two_steps,
        "train_batch_size is not a multiple of per_device_train_batch_size x "
        "gradient_accumulation_steps",
        "with no number of processes do they give a step of the same size",
        "remove gradient_accumulation_steps: it follows from train_batch_size and the number of "
        "processes",
    ),
    Conflict(
        ("max_steps",),
        lambda c: c.training.max_steps == 0,
        "max_steps is 0",
        "nothing would be trained",
        "use -1 to train for num_train_epochs",
    ),
    Conflict(
        ("run_name",),
        lambda c: (c.output.run_name or "").casefold() in NAMES_OF_A_RUNS_FILES,
        "run_name is reserved: every run writes a file or folder of that name",
        "a run without a run_name writes it to output_dir itself",
        "use another run_name",
    ),
)


def find_conflicts(config: Config, given: Mapping[str, Given], misfits: set[str]) -> list[Problem]:
    """Return the conflicts between values; conflicts with an invalid value are left out."""
    problems = [
        Problem(conflict.what, _locations(conflict.keys, given), conflict.why, conflict.remedy)
        for conflict in CONFLICTS
        if not misfits.intersection(conflict.keys) and conflict.applies(config)
    ]
    steps, ratio = config.training.warmup_steps, given.get("warmup_ratio")
    if steps is not None and ratio and not misfits & {"warmup_steps", "warmup_ratio"}:
        where = _locations(("warmup_steps", "warmup_ratio"), given)
        what = "warmup_steps and warmup_ratio are both set"
        why = "both set the length of the warmup"
        problems.append(Problem(what, where, why, "remove one of the two"))
    command = given.get("on_end_command")
    if command is not None and command.origin.kind == "file":
        what, why = "a config file cannot name on_end_command", "reading a file runs no command"
        remedy = "write --on_end_command on the command line, or LORA_TRAINER_ON_END_COMMAND"
        problems.append(Problem(what, command.origin.location, why, remedy))
    return problems


def _locations(keys: tuple[str, ...], given: Mapping[str, Given]) -> str:
    return ", ".join(given[key].origin.location for key in keys if key in given)


# Keys that have no effect unless something else is set.
IDLE: tuple[tuple[str, Check, str], ...] = (
    ("bnb_4bit_quant_type", lambda c: not c.model.use_4bit, "use_4bit is off"),
    ("bnb_4bit_use_double_quant", lambda c: not c.model.use_4bit, "use_4bit is off"),
    (
        "gradient_accumulation_steps",
        lambda c: c.training.train_batch_size is not None,
        "train_batch_size is set; accumulation follows from it and the number of processes",
    ),
    ("max_bad_rows_share", lambda c: c.data.on_bad_rows == "error", "on_bad_rows is error"),
    ("eval_steps", lambda c: not _is_evaluated(c), "there is no held-out data"),
    ("evals_per_epoch", lambda c: not _is_evaluated(c), "there is no held-out data"),
    (
        "early_stopping_threshold",
        lambda c: c.training.early_stopping_patience == 0,
        "early_stopping_patience is 0",
    ),
    ("eval_max_new_tokens", lambda c: not c.training.eval_generate, "eval_generate is off"),
)


def find_warnings(config: Config, given: Mapping[str, Given]) -> list[str]:
    """Return warnings that do not stop the run."""
    warnings = [
        f"{given[key].origin.location}: {key} has no effect: {reason}"
        for key, is_idle, reason in IDLE
        if key in given and is_idle(config)
    ]
    for key, is_set in (
        ("use_dora", config.lora.use_dora),
        ("modules_to_save", bool(config.lora.modules_to_save)),
    ):
        if is_set:
            location = given[key].origin.location if key in given else "adapter_name_or_path"
            warnings.append(f"{location}: vLLM cannot serve an adapter with {key}")
    return warnings
