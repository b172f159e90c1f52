"""A packed forward pass builds no mask, and reads no number back from the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lora_trainer.model.compat import MAJOR
from lora_trainer.model.forward import CausalLM, MicroBatch
from support.families import FAMILIES, VOCABULARY, tiny_model

LENGTHS = (60, 110, 30, 90)
TOKENS = sum(LENGTHS)


class Watch(TorchDispatchMode):
    """Notes the operations that read a number back, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waits.append(str(function))
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def batch() -> MicroBatch:
    order = np.random.Generator(np.random.PCG64(1))
    ids = [order.integers(3, VOCABULARY, length) for length in LENGTHS]
    return MicroBatch(ids, [np.ones(length, dtype=bool) for length in LENGTHS])


def gpt2():
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, pad_token_id=0, **shape)
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_packed_forward_builds_no_mask_and_never_waits_for_the_device(family):
    if family == "qwen2-window" and MAJOR < 5:
        pytest.skip("transformers 4.50 has its window in every layer: padding is used")
    model = gpt2() if family == "gpt2" else tiny_model(family)
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    with torch.no_grad(), Watch() as watch:
        causal._hidden(batch())
    assert watch.waits == []
    assert watch.largest < TOKENS**2
