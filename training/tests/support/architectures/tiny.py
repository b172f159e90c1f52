"""A tiny configuration of any architecture: the class's own defaults, each size made small.

Nothing here knows an architecture but `OWN`: sizes are recognised by the names of their fields,
layers are one of each kind that the defaults list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lora_trainer.model.backend import native_attention

VOCABULARY = 64
LARGEST_PARAMETERS = 50_000_000

# By field name, wherever it stands in a configuration.
SIZES: dict[int, str] = {
    VOCABULARY: """vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size
        pronunciation_vocab_size shape_vocab_size unpadded_vocab_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base codebook_size""",
    32: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim
        input_embedding_size output_embedding_size lru_width attention_hidden_size moe_latent_size
        hidden_size_global audio_hidden_size decoder_hidden_size projector_input_dim
        projector_output_dim out_hidden_size pronunciation_embed_dim shape_embed_dim
        adapter_in_dim adapter_input_size backbone_hidden_size router_hidden_size codebook_dim
        adapter_out_dim output_channels
        vector_quantization_hidden_dimension mamba_d_ssm dim_model_base ple_embed_dim
        upsample_groups""",
    48: """intermediate_size ffn_dim d_ff d_inner dff dim_ff decoder_ffn_dim encoder_ffn_dim
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        expert_ffn_hidden_size ffn_hidden_size n_inner intermediate_size_mlp mlp_dim
        dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size
        shared_intermediate_size""",
    2: """decoder_layers encoder_layers depth
        num_decoder_layers num_encoder_layers num_layers_per_stack num_blocks attn_layer_period
        num_experts_per_tok num_experts_per_token moe_top_k moe_topk moe_k num_experts_per_token
        topk_group n_group num_expert_group expert_layer_period layer_group_size
        num_local_layers n_groups o_groups num_global_layers num_hash_layers
        zero_expert_num linear_num_key_heads mamba_num_groups
        conf_num_hidden_layers number_of_prefix_layers num_lstm_layers hybrid_layer_count""",
    1: """num_dense_layers first_k_dense_replace attn_layer_offset
        moe_layer_start_index n_mamba_heads mamba_n_groups mamba_ngroups""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        index_n_heads linear_num_heads linear_num_value_heads num_query_groups
        conf_num_attention_heads keep_window_size num_centroids""",
    8: """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim d_kv d_head dim_head kv_channels
        attention_head_size swa_head_dim global_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim mamba_d_head mamba_d_state mamba_head_dim mamba_headdim ssm_state_size
        state_size mamba_n_heads mamba_num_heads d_rel rotary_dim query_pre_attn_scalar
        index_head_dim time_step_rank mamba_dt_rank laurel_rank hidden_size_per_layer_input
        adapter_rank adapter_dim gated_norm_rank hc_lowrank attention_head_dim
        chunk_size mamba_chunk_size prompt_mid_dim rel_extent index_topk index_block_size block_size
        local_attn_chunk_length lsh_attn_chunk_length position_bias_num_buckets
        prompt_length segment_types prompt_types""",
    16: """q_lora_rank kv_lora_rank o_lora_rank qk_head_dim mamba_expert_rank""",
    6: """sliding_window sliding_window_size local_attention attention_window_size
        local_attention_window_len attention_chunk_size window_size""",
    128: """max_position_embeddings n_positions n_ctx max_seq_len model_max_length
        max_target_positions context_length position_bias_max_distance""",
    0: "moe_layer_end_index_ num_nextn_predict_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# A vocabulary of 64 ends below the usual ids.
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
NULLABLE = ("head_dim", "n_routed_experts")
# Sizes that must fit one another in ways of their own, or that the class leaves open.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
OWN["llama4"] = {"text_config": OWN["llama4_text"]}
OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}


def tiny_model(model_type: str, attention: str | None = None) -> tuple[Any, Any]:
    """Make a tiny model of the type in float32, its weights drawn from a fixed seed.

    Returns the model and its configuration: a model keeps only the part about text of some.

    The first attempt whose forward pass runs is taken; raises what the first one raised.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    error: Exception | None = None
    for attempt in _attempts(kind, OWN.get(model_type, {})):
        try:
            config = _quiet(kind(**attempt))
            model = _made(config, attention)
            with torch.no_grad():
                model(input_ids=torch.arange(3, 15)[None])
        except Exception as raised:  # whatever a class's validation, or its forward, says
            error = error or raised
        else:
            return model, config
    raise error or ValueError("no attempt")


def _attempts(kind: Any, own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Grouped key and value heads first, layers of each kind first."""
    defaults = kind().to_dict()
    for heads in (2, 4):
        for has_lists in (True, False):
            yield _merged(_shrunk(kind, defaults, heads, has_lists=has_lists), own)


def _merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    inner = {n: values.get(n, {}) | v for n, v in own.items() if isinstance(v, dict)}
    return values | own | inner


def _shrunk(
    kind: Any, defaults: dict[str, Any], kv_heads: int, *, has_lists: bool
) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values: dict[str, Any] = {}
    kinds = {n: list(dict.fromkeys(defaults[n])) for n in PER_LAYER if _is_list(defaults.get(n))}
    layers, whole = 2, 0
    if has_lists and kinds:
        whole = len(defaults[next(iter(kinds))])
        layers = max(2, *(len(each) for each in kinds.values()))
        if defaults.get("num_kv_shared_layers"):
            # The later layers take keys and values from earlier ones of each kind.
            values["num_kv_shared_layers"] = layers
            kinds = {name: each * 2 for name, each in kinds.items()}
            layers *= 2
        for name, each in kinds.items():
            values[name] = each + each[-1:] * (layers - len(each))
    subconfigs = getattr(kind, "sub_configs", {})
    for name, value in defaults.items():
        if name in values or name in ("model_type", "transformers_version"):
            continue
        if isinstance(value, dict) and name in subconfigs:
            inner = CONFIG_MAPPING.get(value.get("model_type"), subconfigs[name])
            values[name] = _shrunk(inner, value, kv_heads, has_lists=has_lists)
            values[name] |= {"model_type": value["model_type"]} if "model_type" in value else {}
        elif name in TOKENS:
            values[name] = TOKENS[name]
        elif name in KV_HEADS and (value is None or _is_number(value)):
            values[name] = kv_heads
        elif name in LAYERS and _is_number(value):
            values[name] = layers
        elif name in SMALL and (_is_number(value) or (value is None and name in NULLABLE)):
            values[name] = SMALL[name]
        elif whole and _is_list(value) and len(value) == whole:
            values[name] = value[:layers]
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value)


def _quiet(config: Any) -> Any:
    """Switch off what would make two passes over the same tokens differ."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    for each in (config, *inner):
        for name, value in list(vars(each).items()):
            if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
                setattr(each, name, 0.0)
        if hasattr(each, "is_decoder") and not getattr(each, "is_encoder_decoder", False):
            each.is_decoder = True
        each.use_cache = False
    return config


def _made(config: Any, attention: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    how = {"attn_implementation": attention or native_attention(config)}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, **how)
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > LARGEST_PARAMETERS:
        raise ValueError(f"the tiny model has {size:,} parameters")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, **how).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual 0.02 makes all logits alike.
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.requires_grad_(False)
