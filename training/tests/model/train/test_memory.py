"""Where memory runs out a step is done again in smaller pieces, with the same figures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lora_trainer.config.schema import Config
from lora_trainer.errors import MemoryKilledError
from lora_trainer.machine import Machine
from lora_trainer.memory_estimate import DataProfile, ModelSize
from lora_trainer.plan import AS_CONFIGURED, make_plan
from lora_trainer.run.events import Evaluated, MemoryReduced, StepDone, Warned
from lora_trainer.run.memory_limits import (
    BatchSizes,
    MemoryLimits,
    in_pieces,
    read_limits,
    reduced,
    why_nothing_fits,
    write_limits,
)
from lora_trainer.train import evaluate, loop, smaller_plans
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.setup import TrainingSetup
from lora_trainer.train.smaller_plans import is_tight, with_smaller_plans
from support.training_loop import make_context, of_kind

BY_EXAMPLES = {"max_tokens_per_micro_batch": 0}
ON_GPU = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ON_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")


def short_of_memory(context, most, error=ON_GPU):
    """Let more than `most` examples at a time fail; return how often that happened."""
    sound, failed = context.causal.loss, []

    def loss(batch, factor):
        if len(batch.ids) > most:
            failed.append(len(batch.ids))
            raise error
        return sound(batch, factor)

    context.causal.loss = loss
    return failed


def trained(tmp_path, spoil=lambda _: None, **training):
    training = BY_EXAMPLES | training
    context, events = make_context(tmp_path, per_device_train_batch_size=8, **training)
    kept = []
    context = replace(context, keep_limits=kept.append)
    failed = spoil(context)
    state = loop.train(context, TrainState())
    losses = [event.loss for event in of_kind(events, StepDone)]
    adapter = {name: p.detach().clone() for name, p in context.parameters.items()}
    return {
        "state": state, "losses": losses, "adapter": adapter, "events": events, "kept": kept,
        "failed": failed, "context": context,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"))


def assert_same(one, other, tolerance=1e-5):
    assert one["losses"] == pytest.approx(other["losses"], abs=tolerance)
    for name, tensor in one["adapter"].items():
        torch.testing.assert_close(tensor, other["adapter"][name], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "error",
    [ON_GPU, ON_CPU, MemoryError(), RuntimeError("std::bad_alloc")],
    ids=["GPU", "CPU", "Python", "C++"],
)
def test_step_that_does_not_fit_is_done_in_smaller_pieces(tmp_path, whole, error):
    short = trained(tmp_path, lambda context: short_of_memory(context, 2, error))
    assert short["failed"] == [8, 4]  # each size failed once, in the first step alone
    assert short["state"].step == 12
    assert_same(short, whole)
    assert short["kept"] == [MemoryLimits(4, 8, False), MemoryLimits(2, 8, False)]
    reported = of_kind(short["events"], MemoryReduced)
    assert [(e.step, e.micro_batch_examples) for e in reported] == [(0, 4), (0, 2)]
    messages = [event.message for event in of_kind(short["events"], Warned)]
    assert "out of memory at step 1; from now on micro-batches of 2 examples" in messages[-1]


def test_budget_of_tokens_is_halved_down_to_the_longest_example(tmp_path, whole):
    def spoil(context):
        sound, failed = context.causal.loss, []

        def loss(batch, factor):
            if batch.tokens > 30:
                failed.append(batch.tokens)
                raise ON_GPU
            return sound(batch, factor)

        context.causal.loss = loss
        return failed

    short = trained(tmp_path, spoil, max_tokens_per_micro_batch=100)
    reported = of_kind(short["events"], MemoryReduced)
    assert [(e.step, e.micro_batch_tokens) for e in reported] == [(0, 50), (0, 25)]
    assert short["kept"][-1] == MemoryLimits(8, 8, False, 25)
    messages = [event.message for event in of_kind(short["events"], Warned)]
    assert "from now on micro-batches of at most 25 tokens" in messages[-1]
    assert_same(short, whole)


def test_attempt_that_fails_in_its_backward_pass_leaves_nothing_behind(tmp_path, whole):
    def spoil(context):
        failed = []
        last = next(iter(context.parameters.values()))

        def hook(_):
            if context.optimizer.state and not failed:
                # Gradients of the layers above are there by now.
                failed.append(sum(p.grad is not None for p in context.parameters.values()))
                raise ON_CPU

        last.register_post_accumulate_grad_hook(hook)
        return failed

    short = trained(tmp_path, spoil)
    assert short["failed"][0] > 1
    assert [event.step for event in of_kind(short["events"], MemoryReduced)] == [1]
    assert_same(short, whole)


def test_dropout_is_that_of_a_run_with_the_smaller_size_from_the_beginning(tmp_path):
    dropout = {"weight_decay": 0.0, **BY_EXAMPLES}
    for folder in ("short", "small"):
        (tmp_path / folder).mkdir()

    def with_dropout(context):
        for name, module in context.causal.model.named_modules():
            if name.endswith("lora_dropout.default"):
                parent = context.causal.model.get_submodule(name.rpartition(".")[0])
                parent["default"] = torch.nn.Dropout(0.5)
                assert isinstance(module, torch.nn.Identity)

    def spoil(context):
        with_dropout(context)
        return short_of_memory(context, 2)

    short = trained(tmp_path / "short", spoil, **dropout)
    context, events = make_context(tmp_path / "small", per_device_train_batch_size=8, **dropout)
    plan = replace(context.plan, micro_batch_examples=2, micro_batches=4)
    context = replace(context, plan=plan)
    with_dropout(context)
    loop.train(context, TrainState())
    assert short["losses"] == [event.loss for event in of_kind(events, StepDone)]
    for name, parameter in context.parameters.items():
        assert torch.equal(parameter, short["adapter"][name])


def is_checkpointing(context):
    return any(getattr(m, "gradient_checkpointing", False) for m in context.causal.inner.modules())


def test_gradient_checkpointing_is_the_last_resort(tmp_path, whole):
    def spoil(context):
        sound, failed = context.causal.loss, []

        def loss(batch, factor):
            if len(batch.ids) > 1 or not is_checkpointing(context):
                failed.append(len(batch.ids))
                raise ON_GPU
            return sound(batch, factor)

        context.causal.loss = loss
        return failed

    short = trained(tmp_path, spoil)
    assert short["failed"] == [8, 4, 2, 1]
    assert short["kept"][-1] == MemoryLimits(1, 8, True)
    assert_same(short, whole)


def test_step_that_does_not_fit_at_all_ends_with_137_and_weights_untouched(tmp_path):
    context, events = make_context(tmp_path, per_device_train_batch_size=8, **BY_EXAMPLES)
    before = {name: p.detach().clone() for name, p in context.parameters.items()}
    short_of_memory(context, 0)
    with pytest.raises(MemoryKilledError) as caught:
        loop.train(context, TrainState())
    assert caught.value.exit_code == 137
    assert caught.value.retry == ""
    (problem,) = caught.value.problems
    assert problem.where == "step 1, micro-batches of 1 example and gradient checkpointing"
    assert "Tried to allocate 2.00 GiB" in problem.why
    assert not of_kind(events, StepDone)
    for name, parameter in context.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_other_errors_are_raised_at_once(tmp_path):
    context, _ = make_context(tmp_path)
    failed = short_of_memory(context, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        loop.train(context, TrainState())
    assert len(failed) == 1


def test_rank_that_shares_its_model_leaves_it_to_the_supervisor(tmp_path):
    context, _ = make_context(tmp_path)
    context.causal.is_sharded = True
    failed = short_of_memory(context, 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        loop.train(context, TrainState())
    assert len(failed) == 1


def test_evaluation_that_does_not_fit_gives_the_same_score(tmp_path, whole):
    def spoil(context):
        sound, failed = context.causal.score, []

        def score(batch):
            if len(batch.ids) > 3:
                failed.append(len(batch.ids))
                raise ON_CPU
            return sound(batch)

        context.causal.score = score
        return failed

    short = trained(tmp_path, spoil)
    assert short["failed"] == [8, 4]  # in the first evaluation alone
    assert short["kept"] == [MemoryLimits(8, 2, False)]
    evals = [of_kind(run["events"], Evaluated) for run in (short, whole)]
    assert [one.eval_loss for one in evals[0]] == pytest.approx(
        [one.eval_loss for one in evals[1]], abs=1e-6
    )
    assert [one.eval_tokens for one in evals[0]] == [one.eval_tokens for one in evals[1]]


def test_evaluation_of_one_row_that_does_not_fit_is_final(tmp_path):
    context, _ = make_context(tmp_path)

    def score(_):
        raise ON_CPU

    context.causal.score = score
    with pytest.raises(MemoryKilledError) as caught:
        evaluate.score(context.causal, context.eval_rows, batch_examples=8)
    assert caught.value.retry == ""


def test_pieces_keep_the_order_of_what_they_hold():
    failed = []

    def work(piece):
        if len(piece) > 2:
            failed.append(len(piece))
            raise MemoryError
        return list(piece)

    results, most = in_pieces(range(7), 4, work)
    assert [item for piece in results for item in piece] == list(range(7))
    assert most == 2


def test_budget_ends_at_the_longest_example_and_then_layers_are_checkpointed():
    limits, now = [], BatchSizes(4, 8, False, micro_batch_tokens=1000, longest_tokens=300)
    while (now := reduced(now)) is not None:
        limits.append((now.micro_batch_tokens, now.gradient_checkpointing))
    assert limits == [(500, False), (300, False), (300, True)]


@pytest.mark.parametrize(
    ("examples", "sizes"),
    [(8, [4, 2, 1]), (6, [3, 1]), (7, [1]), (9, [3, 1]), (1, [])],
)
def test_micro_batch_becomes_its_largest_divisor(examples, sizes):
    reached, now = [], BatchSizes(examples, 8, False)
    while (now := reduced(now)) is not None:
        reached.append((now.micro_batch_examples, now.gradient_checkpointing))
    assert reached == [(size, False) for size in sizes] + [(1, True)]


def plan_of(limits=AS_CONFIGURED, memory_bytes=1 << 34, **training):
    config = Config.model_validate({"training": training})
    data = DataProfile(64, 1, 1, 2048, eval_rows=8)
    shape = ModelSize("tiny", 24, 2048, 50_000, 10**9, 10**6, 4096)
    plan = make_plan(
        config,
        Machine(cores=1, memory_bytes=memory_bytes, gpus=()),
        shape,
        data,
        precision="float32",
        attention="packed",
        padding_free=True,
        limits=limits,
        count=million_a_token,
    )
    return with_smaller_plans(plan, config, shape, data, million_a_token)


def million_a_token(work):
    return sum(work.lengths) * 1_000_000


def test_later_start_keeps_to_what_the_run_was_cut_down_to(tmp_path):
    write_limits(tmp_path, MemoryLimits(2, 4, True))
    plan = plan_of(read_limits(tmp_path), per_device_train_batch_size=8, **BY_EXAMPLES)
    assert (plan.micro_batch_examples, plan.micro_batches, plan.step_examples) == (2, 4, 8)
    assert plan.eval_batch_examples == 4
    assert plan.gradient_checkpointing
    assert any("memory.json" in reason for reason in plan.reasons)


def test_later_start_keeps_to_the_reduced_budget(tmp_path):
    write_limits(tmp_path, MemoryLimits(8, 8, False, 2500))
    plan = plan_of(read_limits(tmp_path), max_tokens_per_micro_batch=5000)
    assert plan.micro_batch_tokens == 2500
    assert any("micro-batches of 2,500 instead of 5,000 tokens" in why for why in plan.reasons)
    # The run stays the same run: its own budget is what its checkpoints carry.
    assert plan.run_batch == "4.1.5000"


@pytest.mark.parametrize("text", ["", "[]", '{"micro_batch_examples": "2"}', "{", '{"a": ' * 9999])
def test_damaged_limits_are_as_good_as_none(tmp_path, text):
    (tmp_path / "memory.json").write_text(text)
    assert read_limits(tmp_path) == MemoryLimits()


def test_plan_that_would_fit_is_named_with_its_numbers(monkeypatch):
    monkeypatch.setattr(smaller_plans.importlib.util, "find_spec", lambda _: object())
    plan = plan_of(memory_bytes=5_600_000_000)
    why, remedy = why_nothing_fits(plan.to_dict())
    assert "5.6 GB are available" in why
    assert re.match(r"--max_seq_length \d+ needs about 4\.\d GB", plan.smaller_plans[0])
    assert "--use_4bit true needs about" in remedy
    assert "--resume never" in remedy


@pytest.mark.parametrize(
    ("gigabytes", "training", "expected"),
    [
        (100, {}, False),
        (7, {}, True),
        (100, {"per_device_train_batch_size": 1}, False),
    ],
)
def test_smaller_plans_are_looked_for_at_once_where_memory_is_tight(gigabytes, training, expected):
    assert is_tight(plan_of(memory_bytes=gigabytes * 10**9, **training)) is expected


@pytest.mark.parametrize("limits", [MemoryLimits(1, 8, True), MemoryLimits(4, 1, False)])
def test_smaller_plans_are_looked_for_at_once_where_nothing_is_left_to_reduce(limits):
    assert is_tight(plan_of(limits, memory_bytes=10**11))


def test_smaller_plans_are_reported_once_a_run_has_nothing_left_to_reduce(tmp_path):
    plan = replace(plan_of(memory_bytes=10**11), least_memory_bytes=0, smaller_plans=())
    setup = object.__new__(TrainingSetup)
    setup.plan, setup.output_dir = plan, tmp_path
    setup.with_smaller_plans = lambda plan: replace(plan, least_memory_bytes=5)
    events = []
    setup.keep_limits(MemoryLimits(1, 8, False), events.append)
    assert events == []
    setup.keep_limits(MemoryLimits(1, 8, True), events.append)
    assert [event.plan["least_memory_bytes"] for event in events] == [5]


def test_machine_that_is_too_small_for_anything_is_named(monkeypatch):
    monkeypatch.setattr(smaller_plans.importlib.util, "find_spec", lambda _: None)
    plan = plan_of(memory_bytes=1_000_000_000)
    assert plan.smaller_plans == ()
    assert "more memory than 1.0 GB" in why_nothing_fits(plan.to_dict())[1]
