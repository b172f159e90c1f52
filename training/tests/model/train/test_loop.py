"""What the loop does at step boundaries: evaluate, keep the best, stop early, stop on request."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.errors import InternalError
from lora_trainer.model.ranks import ALONE, Ranks
from lora_trainer.run.events import CheckpointSaved, Evaluated, Progress, StepDone
from lora_trainer.train import loop
from lora_trainer.train.checkpoint import TrainState
from support.plain_peft import ListRows
from support.training_loop import make_context, of_kind, scores


def test_evaluations_come_at_the_start_at_intervals_and_at_the_end(tmp_path):
    context, events = make_context(tmp_path, eval_steps=5)
    state = loop.train(context, TrainState())
    assert [event.step for event in of_kind(events, Evaluated)] == [0, 5, 10, 12]
    assert state.step == 12
    assert of_kind(events, StepDone)[-1].loss < of_kind(events, StepDone)[0].loss


def test_steps_that_are_not_logged_are_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "BEAT_SECONDS", 0.0)
    context, events = make_context(tmp_path)
    loop.train(replace(context, logging_steps=5, eval_rows=ListRows([])), TrainState())
    assert [event.step for event in of_kind(events, StepDone)] == [1, 5, 10, 12]
    beats = of_kind(events, Progress)
    assert [event.done for event in beats] == [2, 3, 4, 6, 7, 8, 9, 11]
    assert {(event.unit, event.total) for event in beats} == {("steps", 12)}


def test_training_stops_early_when_patience_is_used_up(tmp_path, monkeypatch):
    scores(monkeypatch, [9.0, 2.0, 1.0, 1.5, 1.2, 0.1])
    context, events = make_context(tmp_path, eval_steps=2, early_stopping_patience=2)
    state = loop.train(context, TrainState())
    assert (state.step, state.best_step, state.best_eval_loss) == (8, 4, 1.0)
    assert [event.is_best for event in of_kind(events, Evaluated)] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, monkeypatch):
    scores(monkeypatch, [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    context, _ = make_context(tmp_path, eval_steps=2, save_steps=2)
    loop.train(context, TrainState())
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-000002", "step-000010", "step-000012"]


def test_a_stop_request_ends_at_a_step_boundary_with_a_checkpoint(tmp_path):
    asked = SimpleNamespace(now=False)
    context, events = make_context(tmp_path, should_stop=lambda: asked.now)

    def emit(event):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            asked.now = True

    state = loop.train(replace(context, emit=emit), TrainState())
    assert state.step == 3
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [3]


def test_a_stop_during_an_evaluation_leaves_it_to_the_resumed_run(tmp_path):
    context, events = make_context(tmp_path, should_stop=lambda: True)
    state = loop.train(context, replace(TrainState(), step=12))
    assert state.evaluated_step != 12
    context, events = make_context(tmp_path)
    loop.train(context, state)
    assert [event.step for event in of_kind(events, Evaluated)] == [12]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path):
    context, _ = make_context(tmp_path)
    before = {name: p.detach().clone() for name, p in context.parameters.items()}
    context.causal.loss = lambda *_: next(iter(context.parameters.values())).sum() * torch.nan
    with pytest.raises(InternalError, match="not finite at step 1"):
        loop.train(context, TrainState())
    for name, parameter in context.parameters.items():
        assert torch.equal(parameter, before[name])


def test_time_of_a_rank_includes_its_kernels_and_not_the_wait_for_others(tmp_path, monkeypatch):
    events, measured = [], []
    clock = SimpleNamespace(seconds=0.0)

    class Event:
        """A GPU that needs 3 seconds for what was launched before the event."""

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("synchronize")
            clock.seconds += 3.0

    def sum_step(_ranks, _parameters, loss, own):
        events.append("sum")
        clock.seconds += 100.0  # another rank is slow
        measured.append(own)
        return loss, [own]

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    monkeypatch.setattr(loop, "sum_step", sum_step)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    context, _ = make_context(tmp_path)
    fitting = loop.Fitting(context.plan, context.causal, ALONE, context.emit, context.keep_limits)
    loop._gradients(replace(context, ranks=Ranks(0, 2)), TrainState(), fitting, None)
    assert events == ["record", "synchronize", "sum"]
    assert measured[0].seconds == 3.0
