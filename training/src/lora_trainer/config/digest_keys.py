"""Which keys the hash of a configuration leaves out (`Config.digest`)."""

from __future__ import annotations

LENGTH_KEYS = ("max_steps", "num_train_epochs", "warmup_ratio", "warmup_steps")
LATER_KEYS = {"max_tokens_per_micro_batch": "auto", "min_lr_rate": 0.0}
EXECUTION_KEYS = ("nproc", "parallelism", "share_prefix", "offload_param_device", "on_nan")
NOT_IN_DIGEST = (
    *(("training", key) for key in (*LENGTH_KEYS, *EXECUTION_KEYS)),
    ("model", "model_name_or_path"),
    ("model", "model_revision"),
    ("lora", "adapter_name_or_path"),
    ("model", "hf_token"),
    ("model", "model_cache_dir"),
    ("data", "dataset"),
    ("data", "eval_dataset"),
    ("data", "chat_template"),
    ("data", "datasets_dir"),
    ("data", "max_samples"),
    ("data", "dataset_cache_dir"),
    ("data", "preprocessing_num_workers"),
)
