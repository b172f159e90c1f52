"""On a GPU: the same losses as on the CPU, in float32 closely and in 16 bits roughly."""

from __future__ import annotations

import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.model.adapter import add_adapter
from lora_trainer.model.forward import CausalLM
from lora_trainer.model.probe import verify
from lora_trainer.train.evaluate import take
from support.families import tiny_model
from support.plain_peft import make_rows

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def mean_loss(device: str, precision: str) -> float:
    model = add_adapter(
        tiny_model("llama").to(device, getattr(torch, precision)), LoraSection(lora_r=4), seed=1
    )
    causal = CausalLM(model, device=device, padding_free=True, chunk=16, precision=precision)
    assert verify(causal) == ""
    batch = take(make_rows(8), range(8))
    loss = causal.loss(batch) / batch.targets
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 5e-2)]
)
def test_the_loss_on_a_gpu_is_that_of_the_cpu(precision, tolerance):
    expected = mean_loss("cpu", "float32")
    assert mean_loss("cuda", precision) == pytest.approx(expected, rel=tolerance)
