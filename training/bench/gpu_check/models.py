"""Llama models with random weights: made on the device, or written to a folder to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_trainer.config.schema import ModelSection
from lora_trainer.model import quantize

from .scale import Shape

STANDARD_DEVIATION = 0.02
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama_config(shape: Shape) -> LlamaConfig:
    """Return the model's configuration."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=16_384,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="sdpa",
    )


def make_model(shape: Shape, section: ModelSection, *, device: str, dtype: torch.dtype) -> Any:
    """Return the model, frozen, on the device; each matrix is quantized as soon as it is drawn.

    No more than one matrix is ever there in 16 bits, where the section asks for 4.
    """
    config = llama_config(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, _drawn(module, parameter, device, dtype))
        if section.use_4bit and isinstance(module, nn.Linear) and name != "lm_head":
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, _quantized(module, section, device, dtype))
    # Its frequencies are no parameter, and have no value on the meta device.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    if section.use_4bit:
        model.is_loaded_in_4bit = True  # by which PEFT chooses its layers
        quantize.prepare(model)
    return model


def _drawn(module: Any, parameter: Tensor, device: str, dtype: torch.dtype) -> nn.Parameter:
    value = torch.empty(parameter.shape, device=device, dtype=dtype)
    if "norm" in type(module).__name__.lower():
        value.fill_(1.0)
    else:
        value.normal_(0.0, STANDARD_DEVIATION)
    return nn.Parameter(value, requires_grad=False)


def _quantized(linear: Any, section: ModelSection, device: str, dtype: torch.dtype) -> nn.Module:
    """Return bitsandbytes' layer for a linear layer without a bias."""
    import bitsandbytes

    layer: Any = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=section.bnb_4bit_use_double_quant,
        quant_type=section.bnb_4bit_quant_type,
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=section.bnb_4bit_use_double_quant,
        quant_type=section.bnb_4bit_quant_type,
        module=layer,
    )
    del linear.weight  # the model's layer is replaced; a list of its modules still holds it
    return layer.to(device)


def write_folder(
    folder: Path, shape: Shape, *, device: str, dtype: torch.dtype, shard_bytes: int = 1 << 40
) -> Path:
    """Write a model and a tokenizer of bytes, as the hub would hold them; return the folder."""
    make_model(shape, ModelSection(), device=device, dtype=dtype).save_pretrained(
        folder, max_shard_size=shard_bytes
    )
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
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
        "model_max_length": 16_384,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(path: Path, first: int, count: int) -> Path:
    """Write chat rows that ask for a number's successor, of several lengths."""

    def row(number: int) -> dict[str, Any]:
        asked = "Please. " * (number % 7) + f"What follows {number}?"
        answered = f"After {number} comes {number + 1}."
        return {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            ]
        }

    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(first, first + count)))
    return path
