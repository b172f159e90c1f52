"""A tiny Llama folder and chat data, written without torch: what the fault tests train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WIDTH, INNER, LAYERS, HEADS, POSITIONS = 32, 64, 2, 4, 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(folder: Path) -> Path:
    """Write config, weights drawn from a fixed seed, and a byte-level tokenizer."""
    folder.mkdir(parents=True)
    vocabulary = _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> int:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = len(SPECIAL)
    ids = {token: number for number, token in enumerate(SPECIAL)}
    ids |= {letter: first + number for number, letter in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(ids, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "model_max_length": POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(ids)


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(11)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return draw.normal(0, 0.15, (rows, columns)).astype(np.float32)

    ones = np.ones(WIDTH, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, WIDTH),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(vocabulary, WIDTH),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights |= {f"{at}.self_attn.{n}_proj.weight": matrix(WIDTH, WIDTH) for n in "qkvo"}
        weights |= {f"{at}.mlp.{n}_proj.weight": matrix(INNER, WIDTH) for n in ("gate", "up")}
        weights[f"{at}.mlp.down_proj.weight"] = matrix(WIDTH, INNER)
        weights[f"{at}.input_layernorm.weight"] = ones
        weights[f"{at}.post_attention_layernorm.weight"] = ones
    return weights


def write_rows(path: Path, first: int, count: int) -> Path:
    """Write chat rows that ask for a number's successor."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What follows {number}?"},
                {"role": "assistant", "content": f"After {number} comes {number + 1}."},
            ]
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
