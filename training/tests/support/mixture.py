"""A tiny mixture of experts."""

from __future__ import annotations

import torch
import transformers

from support.families import COMMON

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": {"num_experts": 6, "shared_expert_intermediate_size": 24, **EXPERTS},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Jetmoe": {"num_local_experts": 6, "kv_channels": 8, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 6},
}


def mixture(name: str):
    kind = name.replace("Jetmoe", "JetMoe")
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**(COMMON | MIXTURES[name]))
    return getattr(transformers, f"{kind}ForCausalLM")(config).requires_grad_(False)
