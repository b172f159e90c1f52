"""float16 with a loss scale: torch.amp's numbers, overflows repeated, every byte resumed."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch

from lora_trainer.checkpoint_folder import CorruptCheckpointError
from lora_trainer.config.schema import LoraSection
from lora_trainer.errors import NotFiniteError
from lora_trainer.model.adapter import load_adapter_state
from lora_trainer.model.head import Head, summed_loss
from lora_trainer.model.precision import float16_slowness
from lora_trainer.run.events import Progress, StepDone
from lora_trainer.train import loop, loss_scale
from lora_trainer.train.checkpoint import (
    TrainState,
    restore_generators,
    restore_optimizer,
    state_from,
)
from lora_trainer.train.loss_scale import INITIAL_SCALE, LossScale
from support import ranks_at_work
from support.extras import needs_float16
from support.families import tiny_model
from support.forked import together
from support.plain_peft import ListRows, make_rows, ours, plain
from support.training_loop import make_context, of_kind
from support.weights import weights_of

# torch 2.1.2 has no float16 on a CPU: there the loop scales what is computed in float32.
PRECISION = "float16" if math.isfinite(float16_slowness()) else "float32"


def trained(folder, monkeypatch, *, overflows=(), **settings):
    """Train in float16; the gradients of these attempts at a step (1 is the first) overflow."""
    settings = {"max_steps": 8, "learning_rate": 1e-3} | settings
    context, events = make_context(folder, precision=PRECISION, **settings)
    plan = replace(context.plan, precision="float16")
    context = replace(context, plan=plan, eval_rows=ListRows([]))
    attempts, sound = [], loop.sum_step

    def sum_step(ranks, parameters, *others):
        attempts.append(1)
        if len(attempts) in overflows:
            parameters[0].grad[0, 0] = math.inf
        return sound(ranks, parameters, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "sum_step", sum_step)
        state = loop.train(context, resumed(context))
    return state, of_kind(events, StepDone), context, events


def resumed(context):
    snapshot, _ = context.store.newest()
    if snapshot is None:
        # Low enough for this model, whose first gradients overflow at 65,536.
        return TrainState(loss_scale=LossScale(2.0**10))
    load_adapter_state(context.causal.model, snapshot.adapter)
    restore_optimizer(snapshot, context.optimizer, context.parameters)
    restore_generators(snapshot)
    return snapshot.state


@pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch 2.1.2 has a scaler for CUDA alone"
)
def test_scale_follows_torch_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL_STEPS", 3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs, scale = torch.amp.GradScaler("cpu", growth_interval=3), LossScale()
    for has_overflow in [False] * 4 + [True, True] + [False] * 8 + [True] + [False] * 2:
        theirs.scale(parameter.sum()).backward()
        if has_overflow:
            parameter.grad.fill_(math.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        scale = scale.after_overflow() if has_overflow else scale.after_step()
        assert scale.value == theirs.get_scale()
        assert scale.growth_tracker == theirs._get_growth_tracker()
    assert scale.skipped_steps == 3


def test_figures_of_the_scale_are_those_of_torch():
    parameters = inspect.signature(torch.cuda.amp.GradScaler.__init__).parameters
    figures = {
        "init_scale": INITIAL_SCALE,
        "growth_factor": loss_scale.GROWTH_FACTOR,
        "backoff_factor": loss_scale.BACKOFF_FACTOR,
        "growth_interval": loss_scale.GROWTH_INTERVAL_STEPS,
    }
    assert {name: parameters[name].default for name in figures} == figures


@needs_float16
@pytest.mark.parametrize(
    ("family", "padding_free", "lora"),
    [
        ("llama", False, {}),
        ("llama", True, {}),
        ("gemma2", True, {}),
        ("llama", True, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_float16_trains_what_peft_and_torch_amp_train(family, padding_free, lora, tmp_path):
    rows, lora = make_rows(), LoraSection(lora_r=4, lora_alpha=8, **lora)
    settings = {"lora": lora, "precision": "float16"}
    losses, adapter, sampler = ours(
        tiny_model(family).half(), rows, tmp_path,
        padding_free=padding_free, is_fused=padding_free, **settings,
    )  # fmt: skip
    expected, expected_adapter = plain(tiny_model(family).half(), rows, sampler, **settings)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert losses[-1] < losses[0]
    for name, weights in adapter.items():
        assert weights.dtype == torch.float32
        distance = (weights - expected_adapter[name]).norm() / weights.norm()
        # Padded and not fused, every operation is the reference's own, and so is every bit.
        assert distance == 0 if not padding_free else distance < 1e-2


@needs_float16
def test_gradients_that_float16_rounds_to_zero_reach_the_hidden_states():
    head = Head(torch.nn.Linear(4, 4, bias=False).half().requires_grad_(False))
    head.linear.weight.copy_(torch.eye(4))
    # A label that is all but certain: the gradients of the other logits are e^-18.
    hidden = torch.tensor([[18.0, 0, 0, 0]], dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        summed_loss(head, hidden, torch.tensor([0]), 8, INITIAL_SCALE).backward()
    expected = INITIAL_SCALE * math.exp(-18)
    assert hidden.grad[0, 1:].tolist() == pytest.approx([expected] * 3, rel=1e-2)


def test_step_that_overflows_is_repeated_at_half_the_scale(tmp_path, monkeypatch):
    state, steps, context, events = trained(tmp_path / "a", monkeypatch, overflows={3, 4})
    _, plain_steps, plain_parts, _ = trained(tmp_path / "b", monkeypatch)
    assert [step.step for step in steps] == list(range(1, 9))
    assert state.loss_scale == LossScale(2.0**8, growth_tracker=6, skipped_steps=2)
    assert [step.loss_scale for step in steps] == [1024.0] * 2 + [256.0] * 6
    assert [step.skipped_steps for step in steps] == [0] * 2 + [2] * 6
    assert [event.done for event in of_kind(events, Progress)] == [2, 2]  # signs of life
    assert [s.learning_rate for s in steps] == [s.learning_rate for s in plain_steps]
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in plain_steps], rel=1e-4)
    for one, other in zip(
        context.parameters.values(), plain_parts.parameters.values(), strict=True
    ):
        assert (one - other).norm() < 1e-2 * other.norm()


def test_killed_run_resumes_with_the_same_bytes_and_the_same_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL_STEPS", 3)
    own = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole, _, whole_parts, _ = trained(tmp_path / "whole", monkeypatch, overflows={2}, **own)
    cut, *_ = trained(tmp_path / "cut", monkeypatch, overflows={2}, max_steps=5, **own)
    state, _, context, _ = trained(tmp_path / "cut", monkeypatch, **own)
    assert cut.loss_scale.growth_tracker > 0
    assert state.step == whole.step
    assert state.loss_scale == whole.loss_scale
    for one, other in zip(
        context.parameters.values(), whole_parts.parameters.values(), strict=True
    ):
        assert torch.equal(one, other)


def test_scale_that_collapses_ends_the_run_before_the_weights_change(tmp_path, monkeypatch):
    with pytest.raises(NotFiniteError, match="overflow float16 at step 1") as caught:
        trained(tmp_path, monkeypatch, overflows=range(1, 99))
    (problem,) = caught.value.problems
    assert "--fp16 false" in problem.remedy
    assert caught.value.retry == ""


@needs_float16
def test_loss_that_is_not_finite_is_no_overflow_of_the_scale(tmp_path):
    context, events = make_context(tmp_path, precision="float16")
    before = [p.detach().clone() for p in context.parameters.values()]
    context.causal.loss = lambda *_: weights_of(context).sum() * torch.nan
    with pytest.raises(NotFiniteError, match="not finite at step 1"):
        loop.train(replace(context, eval_rows=ListRows([])), TrainState())
    assert not of_kind(events, StepDone)
    assert all(torch.equal(p, q) for p, q in zip(context.parameters.values(), before, strict=True))


@needs_float16
def test_ranks_skip_together_and_train_what_one_process_trains(tmp_path):
    own = {"dtype": "float16", "overflow_step": 3}
    (alone,) = together(1, tmp_path / "1", ranks_at_work.trained, tmp_path / "1", "none", own)
    both = together(2, tmp_path / "2", ranks_at_work.trained, tmp_path / "2", "ddp", own)
    assert both[0]["scale"] == both[1]["scale"] == alone["scale"]
    assert alone["scale"]["skipped_steps"] > 0
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for name, weights in both[0]["adapter"].items():
        assert torch.equal(weights, both[1]["adapter"][name])
        assert (weights - alone["adapter"][name]).norm() < 1e-2 * weights.norm()


@pytest.mark.parametrize("raw", [5, {"value": "a"}, {"scale": 1.0}])
def test_checkpoint_with_a_strange_scale_is_corrupt(raw):
    with pytest.raises(CorruptCheckpointError):
        state_from({"step": 1, "loss_scale": raw})


def test_checkpoint_of_a_run_without_a_scale_is_read():
    assert state_from({"step": 3}).loss_scale is None
