"""The schema of every key: type, default, limits and description.

Leaf names are unique over all sections and spelled as in Hugging Face's
TrainingArguments and PEFT, so a config may be flat or sectioned. `settings` reads files,
environment and command line and records where each value came from; `plan` resolves the values for
this machine. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .digest_keys import LATER_KEYS, NOT_IN_DIGEST
from .types import Auto, Count, CountOrZero, DatasetFormat, Fraction, Init

EMBEDDED_MODEL = "embedded/SmolLM2-135M-Instruct"
ALL_LINEAR = "all-linear"


class Section(BaseModel):
    """A frozen group of keys; unknown keys and implicit conversions are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model and how it is loaded."""

    model_name_or_path: str = Field(
        EMBEDDED_MODEL,
        min_length=1,
        description="Base model: the embedded one, a local folder, or a Hugging Face hub id",
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="Run Python code from the model repository")
    hf_token: str | None = Field(
        None,
        min_length=1,
        repr=False,
        description="Hugging Face token; prefer HF_TOKEN or HF_TOKEN_FILE",
    )
    use_4bit: bool = Field(False, description="Load the base model in 4 bits (QLoRA)")
    use_8bit: bool = Field(False, description="Load the base model in 8 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format")
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Also quantize the quantization constants; saves 0.4 bits per weight"
    )
    use_flash_attention: bool | Literal["auto", "flash-attn"] = Field(
        "auto",
        description="auto, true: the fastest exact attention available; the plan names it; "
        "false: PyTorch's, an example at a time; flash-attn: that package or an error",
    )
    bf16: bool | Auto = Field(
        "auto",
        description="Compute in bfloat16; auto: on GPUs that support it; CPUs are measured first",
    )
    fp16: bool | Auto = Field(
        "auto", description="Compute in float16 with a loss scale; auto: on GPUs without bfloat16"
    )
    gradient_checkpointing: bool | Auto = Field(
        "auto", description="Recompute activations in the backward pass: less memory, ~30% slower"
    )
    model_cache_dir: str | None = Field(
        None, description="Folder for prepared models; default: in HF_HOME or the user's cache"
    )


class LoraSection(Section):
    """The adapter, in PEFT's terms."""

    adapter_name_or_path: str | None = Field(
        None,
        min_length=1,
        description="Start from this adapter: a run, a checkpoint, or a PEFT folder",
    )
    lora_r: int = Field(16, ge=1, le=4096, description="Rank of the adapter")
    lora_alpha: float = Field(
        32.0, gt=0, le=1e6, description="Scale: the update is multiplied by alpha / r"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input")
    lora_target_modules: str | list[str] = Field(
        ALL_LINEAR,
        min_length=1,
        description="Adapted modules: all-linear, names such as q_proj, or a regular expression",
    )
    lora_target_parameters: list[str] = Field(
        default_factory=list,
        description="Adapted tensors outside linear layers, such as mlp.experts.down_proj: "
        "experts in transformers 5; without dropout and DoRA",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA; vLLM cannot serve it")
    init_lora_weights: bool | Init = Field(
        True, description="true, gaussian, orthogonal, pissa, pissa_niter_N, olora or loftq"
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules trained in full; vLLM cannot serve such adapters"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="LoRA+: learning rate of B divided by that of A"
    )


class DatasetSource(Section):
    """One dataset of several."""

    path: str = Field(min_length=1, description="Local file or folder, or a hub id")
    weight: float = Field(1.0, gt=0, le=1e4, description="How often each row is used per epoch")
    format: DatasetFormat | None = Field(None, description="Overrides dataset_format")
    columns: dict[str, str] | None = Field(None, description="Overrides dataset_columns")
    max_samples: Count | None = Field(None, description="Overrides max_samples")
    subset: str | None = Field(None, description="Subset (configuration) of a hub dataset")
    split: str | None = Field(None, description="Split of a hub dataset")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")


class DataSection(Section):
    """The training data: rows, their format, and which tokens are supervised."""

    dataset: str | list[str | DatasetSource] = Field(
        "demo/train.jsonl",
        min_length=1,
        description="Training data: file, folder, hub id, or a list of them with weights",
    )
    eval_dataset: str | list[str | DatasetSource] | None = Field(None, description="Held-out data")
    eval_fraction: float = Field(
        0.0, ge=0, lt=1, description="Held-out fraction of `dataset`; duplicates stay on one side"
    )
    datasets_dir: str | None = Field(
        None, description="Additional folder in which relative dataset paths are looked up"
    )
    dataset_format: DatasetFormat = Field(
        "auto",
        description="Row format; auto detects it; alpaca_text: Alpaca rows as Stanford's prompt "
        "in plain text; alpaca_chat: that prompt as the user's turn",
    )
    dataset_columns: dict[str, str] = Field(
        default_factory=dict, description="Standard field name -> column name in the data"
    )
    max_samples: Count | None = Field(
        None, description="Use only this many rows, the first ones, of each dataset"
    )
    dataset_split: str = Field("train", description="Split of a hub dataset")
    chat_template: str | None = Field(
        None,
        description="chatml, llama3, mistral, qwen, Jinja text or a file; default: the tokenizer's",
    )
    train_on: Literal["assistant", "last", "all", "completion"] = Field(
        "assistant",
        description="Tokens to train on: every assistant turn, the last one, or all; "
        "completion: all, but only the completion of a row with a prompt and a completion",
    )
    max_seq_length: int = Field(
        2048, ge=8, le=1_048_576, description="Maximum length of an example, in tokens"
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with longer examples"
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        "error", description="What to do with rows that cannot be read"
    )
    max_bad_rows_share: Fraction = Field(
        0.05, description="Maximum fraction of invalid rows when on_bad_rows=skip"
    )
    dataset_cache_dir: str | None = Field(None, description="Folder for tokenized data")
    preprocessing_num_workers: int = Field(
        0, ge=0, le=512, description="Tokenizing processes; 0 uses every core"
    )


class TrainingSection(Section):
    """Optimization."""

    per_device_train_batch_size: Count = Field(
        4, description="Examples per process and micro-batch; see max_tokens_per_micro_batch"
    )
    train_batch_size: Count | None = Field(
        None,
        description="Examples per step over all processes; default: "
        "per_device_train_batch_size x gradient_accumulation_steps x processes",
    )
    per_device_eval_batch_size: Count = Field(8, description="Examples per evaluation batch")
    gradient_accumulation_steps: Count = Field(
        1, description="Micro-batches per step and process; train_batch_size overrides it"
    )
    max_tokens_per_micro_batch: CountOrZero | Auto = Field(
        "auto",
        description="Cut a step into micro-batches of at most so many tokens; auto: no more than "
        "per_device_train_batch_size of the longest rows; 0: by examples",
    )
    num_train_epochs: float = Field(1.0, gt=0, le=1e6, description="Passes over the data")
    max_steps: int = Field(
        -1, ge=-1, le=10**9, description="Optimizer steps; -1: from num_train_epochs"
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW; 8-bit state; or state paged to host memory when a GPU is full",
    )
    learning_rate: float = Field(2e-4, ge=0, le=10, description="Peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="Learning rate schedule after the warmup"
    )
    min_lr_rate: float = Field(
        0.0, ge=0, le=1, description="Fraction of learning_rate at which linear and cosine end"
    )
    warmup_ratio: Fraction = Field(
        0.03, description="Fraction of steps used for the warmup, which begins at 0"
    )
    warmup_steps: CountOrZero | None = Field(None, description="Overrides warmup_ratio")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's denominator term")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 disables it")
    nproc: Count | Auto = Field(
        "auto", description="Processes that share each step; auto: one per visible GPU, else 1"
    )
    parallelism: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        "auto",
        description="Each process holds the base (ddp), or a part; auto: ddp or fsdp, as it fits",
    )
    offload_param_device: Literal["none", "cpu"] = Field(
        "none",
        description="With deepspeed: cpu keeps the frozen layers in the host's memory",
    )
    padding_free: bool | Auto = Field(
        "auto", description="Concatenate a micro-batch's examples instead of padding them"
    )
    share_prefix: bool | Auto = Field(
        "auto", description="On a CPU, compute what a micro-batch's examples begin with alike once"
    )
    loss_chunk_tokens: Count | Auto = Field(
        "auto",
        description="Supervised positions whose logits are in memory at a time; auto: as many as "
        "fit into 64 MiB on a CPU, 512 MiB on a GPU, between 128 and 1024",
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Seed for data order, dropout and adapter initialization"
    )
    eval_steps: CountOrZero = Field(0, description="Steps between evaluations; 0: only at the end")
    evals_per_epoch: CountOrZero = Field(
        0, description="Evaluations per epoch, in place of eval_steps; 0: eval_steps decides"
    )
    on_nan: Literal["error", "warn"] = Field(
        "error", description="What to do if an evaluation is NaN or infinite"
    )
    eval_generate: bool = Field(
        False, description="Answer held-out prompts before and after training; report exact match"
    )
    eval_max_new_tokens: Count = Field(
        128, description="Maximum length of a generated answer, in tokens"
    )
    early_stopping_patience: CountOrZero = Field(
        0, description="Evaluations without improvement before stopping; 0: never stop"
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="Minimum improvement of eval_loss"
    )
    load_best_model_at_end: bool = Field(
        False, description="Export the checkpoint with the lowest eval_loss"
    )


class OutputSection(Section):
    """Output folder, checkpoints and resuming."""

    output_dir: str = Field(
        "outputs",
        min_length=1,
        description="Folder for all results, also s3://, gs:// or az://; default: the checkout's "
        "public/",
    )
    output_cache_dir: str | None = Field(
        None,
        min_length=1,
        description="Local folder of runs on an object store; default: in HF_HOME or the user's "
        "cache",
    )
    run_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run and its subfolder",
    )
    save_steps: CountOrZero = Field(
        100, description="Steps between checkpoints; 0: only at the end"
    )
    saves_per_epoch: CountOrZero = Field(
        0, description="Checkpoints per epoch, in place of save_steps; 0: save_steps decides"
    )
    save_total_limit: Count = Field(3, description="Checkpoints to keep, not counting the best one")
    resume: Literal["auto", "never"] = Field(
        "auto", description="Resume from the newest valid checkpoint, or start over"
    )
    on_finished: Literal["archive", "stop"] = Field(
        "stop",
        description="If the run is already finished: report it, or move it aside and train",
    )


class MonitoringSection(Section):
    """Logging, status server and watchdog."""

    logging_steps: Count = Field(1, description="Steps between log entries")
    quiet: bool = Field(False, description="Print only warnings and errors")
    log_format: Literal["text", "json"] = Field(
        "text", description="What a run prints: text, or one JSON object per event"
    )
    on_end_command: str | None = Field(
        None,
        min_length=1,
        description="Shell command to run at the end; of the command line or environment only",
    )
    webhook_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+\S*$",
        description="Address that gets exit code and results as JSON at the end; a secret",
    )
    report_to: list[Literal["tensorboard", "mlflow", "trackio", "wandb"]] = Field(
        default_factory=lambda: ["tensorboard"],  # type: ignore[arg-type]
        description="Trackers, through Accelerate",
    )
    sample_count: int = Field(3, ge=0, le=100, description="Held-out answers to show in full")
    max_restarts: CountOrZero = Field(
        3, description="Restarts of a crashed worker without progress in between"
    )
    health_host: str = Field("127.0.0.1", description="Address of the status server")
    health_port: int = Field(
        8080, ge=0, le=65535, description="Port of the status server; 0 picks a free one"
    )
    health_linger_seconds: float = Field(
        0.0, ge=0, le=1e7, description="How long the status server stays up after the end"
    )
    health_token_file: str | None = Field(
        None, min_length=1, description="File with a token required for everything but /health"
    )
    health_allowed_hosts: list[str] = Field(
        default_factory=list, description="Additional host names that the status server accepts"
    )
    stall_timeout_seconds: float = Field(
        0.0,
        ge=0,
        description="Time without progress that counts as a stall; 0: from the measured step time",
    )


class Config(Section):
    """The complete configuration of a run."""

    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection = Field(default_factory=DataSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    output: OutputSection = Field(default_factory=OutputSection)
    monitoring: MonitoringSection = Field(default_factory=MonitoringSection)

    def masked(self) -> dict[str, dict[str, Any]]:
        """Return section -> leaf -> value, secrets as `***`."""
        sections = self.model_dump(mode="json")
        for leaves in sections.values():
            leaves |= {
                leaf: "***" for leaf in SECRET_KEYS & leaves.keys() if leaves[leaf] is not None
            }
        return sections

    def digest(self) -> str:
        """Return the sha256 (16 hex digits) of the values that affect the trained weights.

        Base model, adapter, data and template are compared by content, and the length by its
        schedule: `identity` covers those. Keys that only affect display, logging or location are
        excluded.
        """
        kept = self.model_dump(mode="json", exclude={"output", "monitoring"})
        for section, key in NOT_IN_DIGEST:
            kept[section].pop(key)
        # Runs of versions without these keys go on; their batch has a part of its own.
        for key, default in LATER_KEYS.items():
            if kept["training"][key] == default:
                kept["training"].pop(key)
        text = json.dumps(kept, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


SECRET_KEYS = frozenset({"hf_token", "webhook_url"})
