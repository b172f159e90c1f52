"""Whole runs in float16, and base models that overflow it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_trainer.commands.finetuned import FinetunedModel, open_model
from lora_trainer.errors import ConfigError
from lora_trainer.run.events import StepDone
from lora_trainer.run.status import replay
from lora_trainer.train.session import open_session
from support.extras import needs_float16
from support.trained_run import COMPLETION, settings_of, train_run

pytestmark = needs_float16


def test_run_in_float16_reports_its_scale_and_exports_float32(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_trainer.model.precision.float16_slowness", lambda: 1.0)
    run, events = train_run(tmp_path, COMPLETION, "--fp16=true", steps=20)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps[-1].loss < steps[0].loss / 2
    assert all(step.loss_scale >= 1024 for step in steps)
    status = replay(event.to_line() for event in events)
    assert status.latest == steps[-1]
    weights = load_file(run / "final_model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.fixture
def overflowing(tmp_path, monkeypatch):
    """Return the config of a base model whose activations leave float16, on a GPU without bfloat16.

    The choice of precision is that of the GPU, the computation this machine's.
    """
    monkeypatch.setattr(
        "lora_trainer.model.backend.choose_precision",
        lambda section, _: ("float32" if section.fp16 is False else "float16", ""),
    )
    config = settings_of(tmp_path, COMPLETION).config
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e6
    save_file(weights, file, metadata={"format": "pt"})
    return config


def test_base_model_that_overflows_float16_trains_in_float32_with_a_reason(overflowing, tmp_path):
    session = open_session(overflowing, tmp_path / "run", lambda _: None)
    assert (session.plan.precision, session.causal.precision) == ("float32", "float32")
    assert session.causal.inner.dtype == torch.float32
    assert "not finite in float16" in session.plan.reasons[0]
    opened = open_model(FinetunedModel("base", overflowing))
    assert opened.causal.precision == "float32"


def test_float16_that_is_insisted_on_is_refused_for_such_a_model(overflowing, tmp_path):
    model = overflowing.model.model_copy(update={"fp16": True})
    asked = overflowing.model_copy(update={"model": model})
    with pytest.raises(ConfigError, match="overflows float16") as caught:
        open_session(asked, tmp_path / "run", lambda _: None)
    assert caught.value.problems[0].remedy == "--fp16 false"
