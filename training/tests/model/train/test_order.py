"""Order and learning rate are pure functions of the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.config.schema import TrainingSection
from lora_trainer.data.batches import RowView, Sampler, split_micro_batches
from lora_trainer.plan import learning_rate
from lora_trainer.train.optim import make_optimizer, set_learning_rate


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_an_epoch_sees_every_row_once(rows, step_examples, seed):
    order = Sampler(rows, step_examples, seed)
    for epoch in (0, 1):
        first = epoch * order.steps_per_epoch
        seen = [order.step_rows(first + step) for step in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(seen)) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    order = Sampler(100, 10, seed=1)
    assert list(order.step_rows(3)) == list(Sampler(100, 10, seed=1).step_rows(3))
    assert list(order.epoch_order(0)) != list(order.epoch_order(1))
    assert list(order.epoch_order(0)) != list(Sampler(100, 10, seed=2).epoch_order(0))


def test_a_step_is_shared_out_without_changing_it():
    rows = Sampler(10, 7, seed=0).step_rows(0)
    shared = [list(part) for part in split_micro_batches(rows, 3)]
    assert [len(part) for part in shared] == [3, 3, 1]
    assert [row for part in shared for row in part] == list(rows)


def test_weighted_sources_choose_an_epochs_rows():
    order = Sampler(4, 2, 0, lambda epoch: np.array([epoch, 5, 5, 7]))
    assert sorted(order.epoch_order(3)) == [3, 5, 5, 7]


def test_a_view_reads_only_its_rows():
    view = RowView([("a", 0), ("b", 1), ("c", 2)], np.array([2, 0]))
    assert [view[i] for i in range(len(view))] == [("c", 2), ("a", 0)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_schedule_is_that_of_transformers(kind, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(name, optimizer, warmup, 25)
    for step in range(25):
        rate = learning_rate(step, peak=0.3, total_steps=25, warmup_steps=warmup, kind=kind)
        assert rate == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 7])
def test_a_cosine_that_ends_above_zero_is_that_of_transformers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, warmup, 25, {"min_lr_rate": 0.1}
    )
    for step in range(25):
        rate = learning_rate(
            step, peak=0.3, total_steps=25, warmup_steps=warmup, kind="cosine", least=0.1
        )
        assert rate == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_lora_plus_gives_b_a_multiple_and_vectors_no_decay():
    parameters = {
        "x.lora_A.default.weight": torch.nn.Parameter(torch.zeros(2, 2)),
        "x.lora_B.default.weight": torch.nn.Parameter(torch.zeros(2, 2)),
        "x.lora_magnitude_vector.default.weight": torch.nn.Parameter(torch.zeros(2)),
    }
    section = TrainingSection(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(parameters, section, loraplus_lr_ratio=16)
    set_learning_rate(optimizer, 0.01)
    by_parameter = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert [by_parameter[id(p)] for p in parameters.values()] == [
        (0.01, 0.5),
        (0.16, 0.5),
        (0.01, 0.0),
    ]
