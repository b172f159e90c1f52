"""Tiny random models, one per architecture family: two layers, width 32, 64 tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lora_trainer.model.compat import MAJOR

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            # Far below the usual 30 and 50, so that leaving one out shows.
            "final_logit_softcapping": 0.5,
            "attn_logit_softcapping": 0.5,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    ),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "cohere": ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
}
# Mixtures of experts: transformers 5 holds those of a layer in one tensor, 4.50 as linear layers.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
}


def tiny_model(family: str, *, attention: str = "eager") -> Any:
    """Make the family's model in float32, its weights drawn from a fixed seed."""
    name, own = (FAMILIES | MIXTURES)[family]
    if name == "Qwen3" and MAJOR < 5:
        pytest.skip("Qwen 3 came with transformers 4.51")
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    config = config_class(**(COMMON | own))
    config._attn_implementation = attention
    torch.manual_seed(7)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual 0.02 makes all logits alike, and a lost soft-cap invisible.
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.requires_grad_(False)
    return model
