"""Deterministic algorithms are demanded where they exist, and named where they do not."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from lora_trainer.config.schema import LoraSection
from lora_trainer.model import determinism, probe
from lora_trainer.model.adapter import add_adapter
from lora_trainer.model.forward import CausalLM
from lora_trainer.train import evaluate
from support.families import tiny_model
from support.plain_peft import make_rows


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


def varying() -> None:
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_strict_mode_stays_on_where_everything_is_deterministic() -> None:
    assert determinism.require(lambda: None) == ""
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_an_operation_without_a_deterministic_form_is_named_and_passes_from_then_on() -> None:
    reason = determinism.require(varying)
    assert "put_" in reason
    assert "no deterministic implementation" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        varying()


def test_another_fault_of_the_attempt_is_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        determinism.require(broken)


def test_fresh_buffers_are_not_filled_with_nan() -> None:
    determinism.require(lambda: None)
    if hasattr(torch.utils, "deterministic"):
        assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("setting", "refuses", "left"),
    [(":4096:8", False, None), (":4096:8", True, ":4096:8"), (":16:8", False, ":16:8")],
)
def test_a_setting_that_pytorch_has_checked_is_not_parsed_at_every_product(
    monkeypatch, setting, refuses, left
) -> None:
    def multiply() -> None:
        if refuses:
            raise RuntimeError("CUBLAS_WORKSPACE_CONFIG is not set")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(determinism, "_multiply_on_the_gpu", multiply)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
    assert determinism.require(lambda: None) == ""
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == left


@pytest.mark.parametrize("is_strict", [True, False])
def test_generation_is_free_to_vary_and_training_strict_again_after_it(is_strict: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=not is_strict)
    with determinism.relaxed():
        varying()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is not is_strict


def test_the_attempt_leaves_neither_gradients_nor_other_losses() -> None:
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=1)
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    batch = evaluate.take(make_rows(4), range(4))
    before = float(causal.loss(batch).detach())
    assert determinism.require(lambda: probe.exercise(causal)) == ""
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(causal.loss(batch).detach()) == before
