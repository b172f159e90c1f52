"""Values of other trainers' keys, and what they are called here."""

from __future__ import annotations

# Axolotl's names for the templates of model families, which their tokenizers have themselves.
FAMILY_TEMPLATES = frozenset(
    {
        "aya", "cohere", "command_a", "deepseek_v2", "deepseek_v3", "exaone", "exaone4",
        "falcon_h1", "gemma", "gemma3", "gemma3n", "gemma4", "jamba", "llama4", "mistral_v1",
        "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken", "nemotron_h", "phi_3", "phi_35",
        "phi_4", "qwen3", "qwen3_5", "qwen_25", "jinja",
    }
)  # fmt: skip
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}  # fmt: skip
# transformers' schedules by the names of ours: constant has a warmup here too, cosine_with_min_lr
# comes with a min_lr_rate, and without num_cycles, which is refused, the only restart of the cosine
# would be at the end.
SCHEDULES = {
    "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine",
}  # fmt: skip
# Templates of LLaMA-Factory that ship here under the same name; a test compares them.
SHIPPED = ("chatml", "llama3", "mistral")
FLASH = {
    "fa2": True, "fa3": True, "flash_attention_2": True, "flash_attention_3": True, "auto": "auto",
    "sdpa": False, "eager": False, "disabled": False, "flex_attention": "auto",
}  # fmt: skip
OTHER_TRACKERS = (
    "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte",
    "neptune", "swanlab",
)  # fmt: skip
PRECISIONS = {"bfloat16": True, "bf16": True, "float32": False, "fp32": False, "auto": "auto"}
