"""Attention sinks over concatenated examples equal transformers' own attention, and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_trainer.model import flash
from lora_trainer.model.attention import PackedAttention, UnsupportedAttentionError

LENGTHS = (9, 24, 5)
HEADS, KEY_HEADS, WIDTH = 4, 2, 8
SCALE = 0.3


def inputs():
    draw = torch.Generator().manual_seed(5)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in (*shapes, (HEADS,))
    ]


def packed(query, key, value, sink, window):
    attention = PackedAttention()
    attention.lengths = LENGTHS
    return attention(None, query, key, value, None, 0.0, SCALE, window, s_aux=sink)[0]


def eager(query, key, value, sink, window):
    """Compute all tokens by gpt-oss's own attention under a mask that keeps examples apart."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    example = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = torch.arange(len(example))[:, None] - torch.arange(len(example))
    is_seen = (example[:, None] == example) & (distance >= 0) & (distance < (window or 100))
    mask = torch.zeros(is_seen.shape, dtype=query.dtype).masked_fill(~is_seen, float("-inf"))
    module = SimpleNamespace(sinks=sink, num_key_value_groups=HEADS // KEY_HEADS, training=True)
    return gpt_oss.eager_attention_forward(module, query, key, value, mask[None, None], SCALE)[0]


@pytest.mark.parametrize("window", [None, 6, 24], ids=["whole", "window", "longest"])
def test_sinks_equal_the_models_own_attention_with_every_gradient(window):
    results = []
    for attend in (packed, eager):
        tensors = inputs()
        output = attend(*tensors, window)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append((output, *torch.autograd.grad((output * weights).sum(), tensors)))
    for ours, own in zip(*results, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-10, atol=1e-12)


def test_a_kernel_for_variable_lengths_is_not_given_sinks():
    query, key, value, sink = inputs()
    attention = PackedAttention(flash.VariableLength(flash.FLASH_2))  # which is not installed here
    attention.lengths = LENGTHS
    output, _ = attention(None, query, key, value, None, 0.0, SCALE, s_aux=sink)
    torch.testing.assert_close(output, packed(query, key, value, sink, None))


def test_sinks_with_capped_scores_are_unsupported():
    with pytest.raises(UnsupportedAttentionError, match="s_aux with softcap"):
        PackedAttention()(None, *inputs()[:3], None, softcap=5.0, s_aux=torch.zeros(HEADS))
