"""Other trainers' spellings: translated, ignored with a word, or refused with a reason."""

import pytest

from support.resolving import from_file, problem_in, values_of


@pytest.mark.parametrize(
    ("content", "leaf", "value"),
    [
        ({"lora_target_linear": True}, "lora_target_modules", "all-linear"),
        ({"lora_target": "all"}, "lora_target_modules", "all-linear"),
        ({"lora_target": "q_proj, v_proj"}, "lora_target_modules", ["q_proj", "v_proj"]),
        ({"lora_target_modules": ["all-linear"]}, "lora_target_modules", "all-linear"),
        ({"target_modules": "q_proj"}, "lora_target_modules", ["q_proj"]),
        ({"lora_target_modules": r".*\.(q|v)_proj"}, "lora_target_modules", r".*\.(q|v)_proj"),
        ({"flash_attn": "fa2"}, "use_flash_attention", True),
        ({"flash_attn": "sdpa"}, "use_flash_attention", False),
        ({"flash_attn": "disabled"}, "use_flash_attention", False),
        ({"flash_attention": True}, "use_flash_attention", True),
        ({"attn_implementation": "flash_attention_2"}, "use_flash_attention", True),
        ({"torch_dtype": "bfloat16"}, "bf16", True),
        ({"torch_dtype": "float16"}, "fp16", True),
        ({"dtype": "float32"}, "bf16", False),
        ({"fp16": True, "bf16": False}, "fp16", True),
        ({"pissa_init": True}, "init_lora_weights", "pissa"),
        ({"pissa_init": False}, "init_lora_weights", True),
        ({"quantization_bit": 4}, "use_4bit", True),
        ({"quantization_bit": 8}, "use_8bit", True),
        ({"val_set_size": 0.1}, "eval_fraction", 0.1),
        ({"val_set_size": 0}, "eval_fraction", 0.0),
        ({"report_to": "none"}, "report_to", []),
        ({"report_to": "tensorboard"}, "report_to", ["tensorboard"]),
        ({"additional_target": "lm_head,x"}, "modules_to_save", ["lm_head", "x"]),
        ({"train_on_inputs": True}, "train_on", "all"),
        ({"mask_history": True}, "train_on", "last"),
        ({"dataset_text_field": "body"}, "dataset_columns", {"text": "body"}),
        ({"lr_scheduler_type": "constant_with_warmup"}, "lr_scheduler_type", "constant"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "lr_scheduler_type", "cosine"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "cosine"),
        ({"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "min_lr_rate", 0.1),
        ({"lr_scheduler_kwargs": {}}, "min_lr_rate", 0.0),
        ({"cosine_min_lr_ratio": 0.2}, "min_lr_rate", 0.2),
        ({"warmup_steps": 0.1}, "warmup_ratio", 0.1),
        ({"disable_gradient_checkpointing": True}, "gradient_checkpointing", False),
        ({"optim": "adamw_torch_fused"}, "optim", "adamw"),
        ({"optim": "adamw_bnb_8bit"}, "optim", "adamw_8bit"),
        ({"optimizer": "paged_adamw"}, "optim", "paged_adamw_32bit"),
        ({"save_strategy": "epoch"}, "saves_per_epoch", 1),
        ({"eval_strategy": "epoch", "eval_steps": 9}, "evals_per_epoch", 1),
        ({"evals_per_epoch": 4}, "evals_per_epoch", 4),
        ({"max_samples": 100}, "max_samples", 100),
        ({"completion_only_loss": True}, "train_on", "completion"),
        ({"excess_length_strategy": "raise"}, "too_long", "error"),
        ({"early_stopping_steps": 3, "eval_dataset": "a.jsonl", "eval_steps": 9},
         "early_stopping_patience", 3),
        ({"dtype": "bf16"}, "bf16", True),
        ({"float16": True}, "fp16", True),
        ({"use_flash_attention_2": True}, "use_flash_attention", True),
        ({"attn_implementation": "flex_attention"}, "use_flash_attention", "auto"),
        ({"attn_implementation": "kernels-community/vllm-flash-attn3"}, "use_flash_attention",
         "auto"),
        ({"gradient_checkpointing": "offload"}, "gradient_checkpointing", True),
        ({"mask_history": True, "train_on_prompt": False}, "train_on", "last"),
        ({"assistant_only_loss": True, "completion_only_loss": False}, "train_on", "assistant"),
        ({"assistant_only_loss": False, "completion_only_loss": False}, "train_on", "all"),
        ({"report_to": ["swanlab"]}, "report_to", ["tensorboard"]),
        ({"datasets": [{"path": "a", "chat_template": "llama3"}]}, "chat_template", "llama3"),
    ],
)  # fmt: skip
def test_other_spellings_mean_the_same(folder, content, leaf, value):
    assert values_of(from_file(folder, content))[leaf] == value


@pytest.mark.parametrize(
    "content",
    [
        {"val_set_size": 100},
        {"optim": "lion_8bit"},
        {"stage": "dpo"},
        {"quantization_bit": 3},
        {"flash_attn": "fa9"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"pissa_init": "yes"},
        {"block_size": 512},
        {"eval_strategy": "best"},
        {"max_steps_per_epoch": 4},
        {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
        {"dataset_config": "en"},
        {"tokens": ["<tool>"]},
        {"datasets": [{"path": "a", "roles": {"user": ["me"]}}]},
        {"datasets": [{"path": "a", "field_chosen": "chosen"}]},
        {"datasets": [{"path": "a", "chat_template": "llama3"}, {"path": "b"}]},
        {"datasets": [{"path": "a", "type": "alpaca:phi"}]},
        {"datasets": [{"path": "a", "split": "train[:1%]"}]},
        {"datasets": [{"path": "a", "split_thinking": True}]},
        {"dataset_train_split": "train[:90%]"},
        {"report_to": ["wandb", "swanlab"]},
        {"stage": "pt"},
        {"lora_layers_to_transform": [0]},
        {"system_prompt": "Be brief."},
        {"datasets": [{"path": "a", "message_property_mappings": {"role": "who"}}]},
        {"datasets": [{"path": "a", "type": {"format": "{instruction}"}}]},
        {"datasets": [{"path": "a", "type": "chat_template.argilla"}]},
        {"eval_steps": 0.05},
        {"save_steps": 0.25},
        {"lora_target_linear": 1},
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(folder, content):
    problem = problem_in(folder, content)
    assert problem.what.startswith(f"{next(iter(content))} cannot be ")
    assert problem.why


# In older files of these trainers; their newest argument lists no longer have them.
FORMER = """
unsloth_lora_mlp unsloth_cross_entropy_loss flash_attn_fuse_qkv xformers_attention sft_packing
sample_packing_seq_len_multiplier num_of_sequences dataset_batch_size wandb_offline
gradient_checkpointing_use_reentrant push_to_hub_revision logging_strategy gptq_groupsize
"""


@pytest.mark.parametrize("key", FORMER.split())
def test_former_keys_that_change_no_number_are_ignored_with_a_reason(folder, key):
    (warning,) = from_file(folder, {key: True}).warnings
    assert f"{key} has no effect: " in warning


def test_axolotl_configuration_resolves(folder):
    resolved = from_file(
        folder,
        """
base_model: NousResearch/Llama-2-7b-hf
model_type: LlamaForCausalLM
load_in_4bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
  - path: other/chat
    type: chat_template
    split: train
val_set_size: 0.05
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_modules:
lora_target_linear: true
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
fp16:
flash_attention: true
deepspeed:
""",
        "axolotl.yml",
    )
    values = values_of(resolved)
    assert values["model_name_or_path"] == "NousResearch/Llama-2-7b-hf"
    assert [entry.format for entry in values["dataset"]] == ["alpaca_text", "auto"]
    assert (values["use_4bit"], values["lora_alpha"], values["num_train_epochs"]) == (True, 16, 4)
    assert any("sample_packing" in warning for warning in resolved.warnings)


def test_llama_factory_configuration_resolves(folder):
    resolved = from_file(
        folder,
        """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity.json
cutoff_len: 1024
overwrite_cache: true
overwrite_output_dir: true
output_dir: saves/lora
plot_loss: true
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
bf16: true
ddp_timeout: 180000000
""",
        "factory.yaml",
    )
    values = values_of(resolved)
    assert (values["lora_r"], values["max_seq_length"], values["learning_rate"]) == (8, 1024, 1e-4)
    assert values["lora_target_modules"] == "all-linear"


def test_axolotl_configuration_with_trackers_and_tokens_resolves(folder):
    resolved = from_file(
        folder,
        """
base_model: Qwen/Qwen2.5-0.5B-Instruct
chat_template: tokenizer_default
strange_blank_key:
strange_empty_list: []
datasets:
  - path: talks.jsonl
    type: chat_template
    ds_type: json
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    roles_to_train: [assistant]
    train_on_eos: turn
lora_model_dir:
lora_r: 8
optimizer: paged_adamw_8bit
wandb_project: mine
wandb_entity: us
wandb_watch: gradients
wandb_name: first
wandb_log_model: checkpoint
special_tokens:
  pad_token: <|endoftext|>
weight_decay: 0.0
""",
        "axolotl.yml",
    )
    values = values_of(resolved)
    assert values["chat_template"] is None
    assert values["dataset"][0].format == "auto"
    warned = " ".join(resolved.warnings)
    assert values["optim"] == "paged_adamw_8bit"
    keys = ("wandb_project", "wandb_watch", "wandb_log_model", "special_tokens")
    assert all(key in warned for key in keys)
    assert "strange" not in warned


def test_llama_factory_configuration_with_a_template_name_resolves(folder):
    resolved = from_file(
        folder,
        """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
stage: sft
finetuning_type: lora
lora_target: all
template: qwen
dataset: talks.json
output_dir: saves/mine
report_to: none
warmup_ratio: 0.1
lr_scheduler_type: cosine
optim: adamw_8bit
val_size: 0.1
eval_strategy: steps
eval_steps: 50
resume_from_checkpoint: null
""",
        "factory.yaml",
    )
    assert values_of(resolved)["chat_template"] is None
    assert any("template has no effect" in warning for warning in resolved.warnings)


def test_trl_configuration_resolves(folder):
    resolved = from_file(
        folder,
        """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: org/talks
dataset_train_split: train
torch_dtype: bfloat16
max_length: 1024
packing: true
assistant_only_loss: true
eos_token: <|im_end|>
use_peft: true
lora_r: 32
lora_target_modules: [all-linear]
gradient_checkpointing: true
push_to_hub: true
hub_model_id: us/mine
report_to: [tensorboard]
""",
        "trl.yaml",
    )
    values = values_of(resolved)
    assert (values["dataset"], values["max_seq_length"]) == ("org/talks", 1024)
    assert values["lora_target_modules"] == "all-linear"
    assert any("nothing is pushed" in warning for warning in resolved.warnings)
