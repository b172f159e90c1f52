"""What the loop needs, without a session around it."""

from __future__ import annotations

import torch

from lora_trainer.config.schema import Config, LoraSection
from lora_trainer.data.batches import Sampler
from lora_trainer.machine import Machine
from lora_trainer.memory_estimate import DataProfile, ModelSize
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.forward import CausalLM
from lora_trainer.plan import make_plan
from lora_trainer.train import evaluate, loop
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.optim import make_optimizer
from support.families import VOCABULARY, tiny_model
from support.plain_peft import ListRows, make_rows


def make_context(
    folder, *, save_steps=0, should_stop=lambda: False, precision="float32", **training
):
    settings = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-2}
    config = Config.model_validate(
        {"training": settings | training, "output": {"save_steps": save_steps}}
    )
    base = tiny_model("llama").to(getattr(torch, precision))
    model = add_adapter(base, LoraSection(lora_r=4), seed=1)
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=64, precision=precision)
    parameters = trainable_parameters(model)
    rows = make_rows()
    plan = make_plan(
        config,
        Machine(cores=1, memory_bytes=1 << 34, gpus=()),
        ModelSize("tiny", 2, 32, VOCABULARY, 1, 1, 128),
        DataProfile(len(rows), 1, 1, 20, eval_rows=8),
        precision=precision,
        attention="packed",
        padding_free=True,
    )
    events = []
    context = loop.TrainingContext(
        causal=causal,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.training),
        sampler=Sampler(len(rows), plan.step_examples, 0),
        rows=rows,
        eval_rows=ListRows(rows[:8]),
        store=CheckpointStore(folder, keep=2, digest="x"),
        plan=plan,
        training=config.training,
        logging_steps=1,
        emit=events.append,
        should_stop=should_stop,
    )
    return context, events


def scores(monkeypatch, losses):
    """Let evaluations find these losses, one after another."""
    remaining = iter(losses)
    monkeypatch.setattr(
        loop.evaluate, "score", lambda *_, **__: evaluate.Score(next(remaining), 0.5, 10, 0.1)
    )


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]
