"""Every step's losses are those of the adapters that the step before left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_trainer.run.events import StepDone
from lora_trainer.train import loop
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.optim import make_optimizer
from support.quantized import needs_bitsandbytes
from support.training_loop import make_context, of_kind


class Unnoticed(torch.optim.AdamW):
    """AdamW that writes to memory as a kernel does, of which autograd knows nothing."""

    def step(self, closure=None):
        held = [(group, group["params"]) for group in self.param_groups]
        for group, parameters in held:
            shared = [parameter.data for parameter in parameters]
            for one, parameter in zip(shared, parameters, strict=True):
                one.grad = parameter.grad
                self.state[one] = self.state.pop(parameter, {})
            group["params"] = shared
        super().step(closure)
        for group, parameters in held:
            for one, parameter in zip(group["params"], parameters, strict=True):
                self.state[parameter] = self.state.pop(one)
            group["params"] = parameters


def losses(folder, precision, optimizer=None, **training):
    context, events = make_context(folder, precision=precision, **training)
    if optimizer is not None:
        same = make_optimizer(context.parameters, context.training)
        context = replace(context, optimizer=optimizer(same.param_groups))
    loop.train(replace(context, eval_rows=[]), TrainState())
    return [event.loss for event in of_kind(events, StepDone)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_optimizer_that_writes_past_autograd_trains_as_any_other(tmp_path, precision):
    expected = losses(tmp_path / "a", precision)
    assert losses(tmp_path / "b", precision, Unnoticed) == expected
    assert expected[-1] < expected[0]


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_takes_the_steps_of_pytorchs_adamw(tmp_path, optim):
    # Tensors this small have no state in 8 bits.
    expected = losses(tmp_path / "a", "float32")
    assert losses(tmp_path / "b", "float32", optim=optim) == pytest.approx(expected, rel=1e-4)
