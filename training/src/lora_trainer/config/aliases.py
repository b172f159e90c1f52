"""Aliases of keys: the spellings of Axolotl, LLaMA-Factory, TRL and Hugging Face."""

from __future__ import annotations

# alias -> canonical leaf name; comments name the source of the spelling.
ALIASES: dict[str, str] = {
    # Axolotl
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "load_in_4bit": "use_4bit",
    "load_in_8bit": "use_8bit",
    "flash_attention": "use_flash_attention",
    "use_flash_attention_2": "use_flash_attention",
    "lora_target_linear": "lora_target_modules",
    "lora_model_dir": "adapter_name_or_path",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "lora_modules_to_save": "modules_to_save",
    "datasets": "dataset",
    "test_datasets": "eval_dataset",
    "val_set_size": "eval_fraction",
    "sequence_len": "max_seq_length",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "peft_init_lora_weights": "init_lora_weights",
    "train_on_inputs": "train_on",
    "dataset_prepared_path": "dataset_cache_dir",
    "dataset_processes": "preprocessing_num_workers",
    "excess_length_strategy": "too_long",
    "chat_template_jinja": "chat_template",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "bf16",
    # LLaMA-Factory
    "template": "chat_template",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "additional_target": "modules_to_save",
    "cutoff_len": "max_seq_length",
    "val_size": "eval_fraction",
    "dataset_dir": "datasets_dir",
    "flash_attn": "use_flash_attention",
    "quantization_bit": "use_4bit",
    "quantization_type": "bnb_4bit_quant_type",
    "double_quantization": "bnb_4bit_use_double_quant",
    "pissa_init": "init_lora_weights",
    "disable_gradient_checkpointing": "gradient_checkpointing",
    "train_on_prompt": "train_on",
    "mask_history": "train_on",
    "tokenized_path": "dataset_cache_dir",
    "cache_dir": "model_cache_dir",
    "hf_hub_token": "hf_token",
    "early_stopping_steps": "early_stopping_patience",
    # TRL and Hugging Face
    "max_length": "max_seq_length",
    "model_max_length": "max_seq_length",
    "dataset_name": "dataset",
    "lora_task_target_modules": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "r": "lora_r",
    "rank": "lora_r",
    "use_rs_lora": "use_rslora",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "attn_implementation": "use_flash_attention",
    "dtype": "bf16",
    "torch_dtype": "bf16",
    "assistant_only_loss": "train_on",
    "completion_only_loss": "train_on",
    "test_split_size": "eval_fraction",
    "dataset_text_field": "dataset_columns",
    "dataset_num_proc": "preprocessing_num_workers",
    "dataset_train_split": "dataset_split",
    "chat_template_path": "chat_template",
    "epochs": "num_train_epochs",
    "log_every_n_steps": "logging_steps",
    "enable_activation_checkpointing": "gradient_checkpointing",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "optim_beta1": "adam_beta1",
    "optimizer": "optim",
    "hub_token": "hf_token",
    "token": "hf_token",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    # NeMo and Megatron; Composer
    "global_batch_size": "train_batch_size",
    "global_train_batch_size": "train_batch_size",
}
# Aliases whose values have another type than their leaf: `layers` translates them.
CONVERTED_ALIASES = frozenset(
    {
        "assistant_only_loss", "attn_implementation", "bfloat16", "completion_only_loss",
        "dataset_text_field", "disable_gradient_checkpointing", "dtype", "excess_length_strategy",
        "flash_attn", "float16", "float32", "lora_target_linear",
        "mask_history", "pissa_init", "quantization_bit", "torch_dtype",
        "train_on_inputs", "train_on_prompt",
    }
)  # fmt: skip
# Leaves whose value may also be written as "a, b".
COMMA_LISTS = frozenset(
    {
        "health_allowed_hosts", "lora_target_modules", "lora_target_parameters",
        "modules_to_save", "report_to",
    }
)  # fmt: skip
