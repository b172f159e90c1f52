"""Numbers that are not finite are neither saved nor exported, and their cause is named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.errors import NotFiniteError
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.run.events import CheckpointSaved, Evaluated, StepDone, Warned
from lora_trainer.train import evaluate, loop
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.export import save_adapter
from lora_trainer.train.finite import is_finite
from support.families import VOCABULARY, tiny_model
from support.plain_peft import ListRows
from support.training_loop import make_context, of_kind, scores
from support.weights import weights_of

ODD = VOCABULARY - 1  # a token whose embedding is infinite in these tests


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_odd_number_among_many_tensors_is_found(value, dtype):
    tensors = [torch.ones(3, 5, dtype=dtype), torch.ones(7), torch.zeros(0), torch.arange(3)]
    assert is_finite(tensors)
    tensors[0][1, 2] = value
    assert not is_finite(tensors)


def test_largest_numbers_are_finite():
    assert is_finite([torch.full((100,), torch.finfo(torch.float32).max)])


def test_nothing_is_finite():
    assert is_finite([])


def spoiled(context, at_step, spoil):
    """Have the optimizer spoil something in its n-th step."""
    step, taken = context.optimizer.step, []

    def take_step():
        step()
        taken.append(1)
        if len(taken) == at_step:
            spoil()

    context.optimizer.step = take_step


def test_last_step_that_diverges_is_not_saved(tmp_path):
    context, events = make_context(tmp_path, save_steps=4)
    context = replace(context, eval_rows=ListRows([]))
    spoiled(context, 12, lambda: weights_of(context).data[0, 0].fill_(math.nan))
    with pytest.raises(NotFiniteError, match="not finite after step 12") as caught:
        loop.train(context, TrainState())
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [4, 8]
    assert "checkpoint of step 8 is valid and finite" in caught.value.problems[0].why
    assert (caught.value.retry, caught.value.step) == ("not_finite", 12)


def test_moments_that_overflow_are_not_saved(tmp_path):
    context, events = make_context(tmp_path, save_steps=4)
    context = replace(context, eval_rows=ListRows([]))

    def spoil():
        context.optimizer.state[weights_of(context)]["exp_avg_sq"][0, 0] = math.inf

    spoiled(context, 4, spoil)
    with pytest.raises(NotFiniteError, match="not finite after step 4") as caught:
        loop.train(context, TrainState())
    assert not of_kind(events, CheckpointSaved)
    assert "there is no checkpoint yet" in caught.value.problems[0].why


def test_damaged_checkpoint_is_not_called_sound(tmp_path):
    context, _ = make_context(tmp_path, save_steps=4)
    context = replace(context, eval_rows=ListRows([]))

    def spoil():
        weights_of(context).data.fill_(math.nan)
        context.store.before_reading()
        for path in tmp_path.glob("step-*/adapter.safetensors"):
            path.write_bytes(b"torn")

    spoiled(context, 12, spoil)
    with pytest.raises(NotFiniteError) as caught:
        loop.train(context, TrainState())
    assert "there is no checkpoint yet" in caught.value.problems[0].why


def test_weights_that_diverge_on_the_way_are_blamed_on_the_learning_rate(tmp_path):
    context, _ = make_context(tmp_path, save_steps=2)
    context = replace(context, eval_rows=ListRows([]))
    spoiled(context, 3, lambda: weights_of(context).data.fill_(math.nan))
    with pytest.raises(NotFiniteError, match=r"not finite at step 4$") as caught:
        loop.train(context, TrainState())
    (problem,) = caught.value.problems
    assert "checkpoint of step 2 is valid" in problem.why
    assert "--learning_rate 0.001 " in problem.remedy
    assert "--resume never" in problem.remedy


def test_adapter_that_is_not_finite_is_not_exported(tmp_path):
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=1)
    next(iter(trainable_parameters(model).values())).data[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="was not exported"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def with_odd_token(context, rows, index):
    """Give the model a token that overflows it, and one of the rows that token."""
    with torch.no_grad():
        context.causal.inner.get_input_embeddings().weight[ODD] = math.inf
    clean = [(np.where(ids == ODD, 0, ids), marks) for ids, marks in rows]
    odd, marks = clean[index]
    clean[index] = (np.concatenate([odd[:-1], [ODD]]), np.ones(len(odd), dtype=bool))
    # What comes after the odd token is spoiled by it.
    clean[index] = (np.concatenate([[ODD], clean[index][0]])[: len(odd)], marks)
    return ListRows(clean)


def named(indices, is_held_out):
    return [f"{'held-out' if is_held_out else 'train'}.jsonl:{index + 1}" for index in indices]


def test_training_row_that_overflows_is_named_and_not_the_learning_rate(tmp_path):
    context, events = make_context(tmp_path)
    (first, *_) = context.sampler.step_rows(2)
    rows = with_odd_token(context, list(context.rows), int(first))
    held_out = ListRows([row for i, row in enumerate(rows) if i != first][:4])
    context = replace(context, rows=rows, eval_rows=held_out, name_rows=named)
    with pytest.raises(NotFiniteError, match="step 3: 1 of 4 rows is the cause") as caught:
        loop.train(context, TrainState())
    (problem,) = caught.value.problems
    assert problem.where == f"train.jsonl:{first + 1}"
    assert "learning_rate" not in problem.remedy
    assert caught.value.retry == ""
    assert of_kind(events, StepDone)[-1].step == 2


def test_row_whose_gradient_alone_overflows_is_named(tmp_path):
    context, _ = make_context(tmp_path)
    first = int(context.sampler.step_rows(0)[1])
    odd = context.rows[first][0].tolist()
    sound = context.causal.loss

    def loss(batch, factor):
        value = sound(batch, factor)
        if any(ids.tolist() == odd for ids in batch.ids):
            # The square root has no slope at zero: the loss stays as it is.
            value = value + (weights_of(context) * 0).abs().sum().sqrt()
        return value

    context.causal.loss = loss
    context = replace(context, eval_rows=ListRows([]), name_rows=named)
    with pytest.raises(NotFiniteError, match="1 of 4 rows is the cause") as caught:
        loop.train(context, TrainState())
    assert caught.value.problems[0].where == f"train.jsonl:{first + 1}"


def test_weights_that_overflow_some_rows_before_others_are_the_cause(tmp_path):
    context, _ = make_context(tmp_path)
    kept = []
    odd = context.rows[int(context.sampler.step_rows(3)[0])][0].tolist()
    sound = context.causal.score

    def score(batch):
        is_adapted = any(bool(p.any()) for n, p in context.parameters.items() if "lora_B" in n)
        has_odd = any(ids.tolist() == odd for ids in batch.ids)
        return (math.inf, 0) if is_adapted and has_odd else sound(batch)

    context.causal.score = score

    def spoil():
        kept.extend(p.detach().clone() for p in context.parameters.values())
        context.causal.loss = lambda *_: weights_of(context).sum() / 0

    spoiled(context, 3, spoil)
    context = replace(context, eval_rows=ListRows([]), name_rows=named)
    with pytest.raises(NotFiniteError, match=r"not finite at step 4$") as caught:
        loop.train(context, TrainState())
    assert "learning_rate" in caught.value.problems[0].remedy
    # What was put aside to find out is back.
    assert all(torch.equal(p, q) for p, q in zip(context.parameters.values(), kept, strict=True))


def with_odd_held_out_row(tmp_path, **training):
    context, events = make_context(tmp_path, **training)
    rows = with_odd_token(context, list(context.eval_rows), 5)
    clean = ListRows([row for row in rows if ODD not in row[0]])
    sampler = replace(context.sampler, rows=len(clean))
    return replace(context, rows=clean, sampler=sampler, eval_rows=rows, name_rows=named), events


def test_held_out_row_that_overflows_ends_the_run_at_the_first_evaluation(tmp_path):
    context, events = with_odd_held_out_row(tmp_path)
    with pytest.raises(NotFiniteError, match=r"evaluation at step 0 .* 1 of 8 rows") as caught:
        loop.train(context, TrainState())
    (problem,) = caught.value.problems
    assert problem.where == "held-out.jsonl:6"
    assert "--on_nan warn" in problem.remedy
    assert not of_kind(events, StepDone)


def test_held_out_row_that_overflows_may_be_warned_of(tmp_path):
    context, events = with_odd_held_out_row(
        tmp_path, on_nan="warn", eval_steps=2, early_stopping_patience=2
    )
    state = loop.train(context, TrainState())
    # Neither a success nor a failure: the patience is not used up.
    assert (state.step, state.best_step, state.evaluations_without_better) == (12, None, 0)
    assert all(math.isnan(event.eval_loss) for event in of_kind(events, Evaluated))
    messages = [event.message for event in of_kind(events, Warned)]
    assert len(messages) == 7
    assert "held-out.jsonl:6" in messages[0]


def test_evaluation_by_diverged_weights_names_no_row(tmp_path, monkeypatch):
    context, _ = make_context(tmp_path, eval_steps=2)
    spoiled(context, 2, lambda: weights_of(context).data.fill_(math.nan))
    with pytest.raises(NotFiniteError, match=r"evaluation at step 2 is not finite$") as caught:
        loop.train(context, TrainState())
    assert "learning_rate" in caught.value.problems[0].remedy


def test_infinite_figure_without_a_bad_row_still_ends_the_run(tmp_path, monkeypatch):
    scores(monkeypatch, [math.inf])
    context, _ = make_context(tmp_path)
    with pytest.raises(NotFiniteError):
        loop.train(context, TrainState())


def test_score_names_the_rows_of_batches_that_are_not_finite(tmp_path):
    context, _ = with_odd_held_out_row(tmp_path)
    score = evaluate.score(context.causal, context.eval_rows, batch_examples=2)
    assert 5 in score.suspects
    assert len(score.suspects) == 2
