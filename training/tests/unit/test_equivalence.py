"""Our loop trains what plain transformers + PEFT train: every loss, and the adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY, tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_trainer.config.schema import Config, LoraSection
from lora_trainer.data.batches import Sampler
from lora_trainer.machine import Machine
from lora_trainer.memory_estimate import DataProfile, ModelSize
from lora_trainer.model import attention
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.compat import MAJOR, enable_checkpointing
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import verify
from lora_trainer.plan import make_plan
from lora_trainer.run.events import Event, StepDone
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.loop import TrainingContext, train
from lora_trainer.train.optim import make_optimizer

STEPS = 20
SETTINGS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.1,
    # Low enough to clip every step, so that the clipping is compared too.
    "max_grad_norm": 0.05,
    "weight_decay": 0.01,
    "loss_chunk_tokens": 7,
}


class ListRows(list):
    """Rows in memory, as the loop reads them."""


def make_rows(count: int = 31, vocabulary: int = VOCABULARY) -> ListRows:
    sampler = np.random.Generator(np.random.PCG64(3))
    rows = ListRows()
    for _ in range(count):
        length = int(sampler.integers(4, 20))
        ids = sampler.integers(3, vocabulary, length)
        marks = np.arange(length) >= sampler.integers(1, length)
        rows.append((ids, marks))
    return rows


def ours(
    model, rows, folder: Path, *, padding_free: bool, lora: LoraSection, own=None,
    precision="float32",
):  # fmt: skip
    settings = SETTINGS | (own or {})
    known = {key: value for key, value in settings.items() if key != "has_checkpointing"}
    config = Config.model_validate({"training": known, "output": {"save_steps": 0}})
    peft_model = add_adapter(model, lora, seed=11)
    if settings.get("has_checkpointing"):
        enable_checkpointing(model)
    causal = CausalLM(
        peft_model, device="cpu", padding_free=padding_free, chunk=7, precision=precision
    )
    parameters = trainable_parameters(peft_model)
    shape = ModelSize("tiny", 2, 32, VOCABULARY, 1, 1, 128)
    plan = make_plan(
        config,
        Machine(cores=1, memory_bytes=1 << 34, gpus=()),
        shape,
        DataProfile(len(rows), 1, 1, 20),
        precision=precision,
        attention="packed",
        padding_free=padding_free,
    )
    events: list[Event] = []
    sampler = Sampler(len(rows), plan.step_examples, seed=5)
    context = TrainingContext(
        causal=causal,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.training),
        sampler=sampler,
        rows=rows,
        eval_rows=ListRows(),
        store=CheckpointStore(folder, keep=1, digest="x"),
        plan=plan,
        training=config.training,
        logging_steps=1,
        emit=events.append,
        should_stop=lambda: False,
    )
    train(context, TrainState())
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    return losses, {name: p.detach().clone() for name, p in parameters.items()}, sampler


def plain(
    model, rows, sampler: Sampler, *, lora: LoraSection, own=None, targets=None, precision="float32"
):
    """Train with transformers and PEFT alone: padded batches, labels -100, their own loss.

    In float16 with PyTorch's autocast and loss scaler.
    """
    scaler = torch.amp.GradScaler("cpu") if precision == "float16" else None
    settings = SETTINGS | (own or {})
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    peft_model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            **(targets or {"target_modules": "all-linear"}),
            modules_to_save=list(lora.modules_to_save) or None,
        ),
    )
    peft_model.train()
    parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    decayed = [p for p in parameters.values() if p.ndim > 1]
    optimizer = torch.optim.AdamW(decayed, lr=settings["learning_rate"], weight_decay=0.01)
    scheduler = transformers.get_scheduler("cosine", optimizer, math.ceil(0.1 * STEPS), STEPS)
    losses = []
    for step in range(STEPS):
        chosen = [rows[i] for i in sampler.step_rows(step)]
        is_taken = False
        while not is_taken:  # as our loop does, a step that overflows is repeated
            total = accumulated(peft_model, chosen, scaler)
            is_taken = stepped(optimizer, parameters.values(), settings["max_grad_norm"], scaler)
        scheduler.step()
        losses.append(total)
    return losses, {name: p.detach().clone() for name, p in parameters.items()}


def accumulated(peft_model, chosen, scaler) -> float:
    """Add up the gradients of a step's rows, three at a time; return their mean token loss."""
    targets = sum(int(marks[1:].sum()) for _, marks in chosen)
    total = 0.0
    for start in range(0, len(chosen), 3):
        micro = chosen[start : start + 3]
        longest = max(len(ids) for ids, _ in micro)
        ids = torch.zeros(len(micro), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (tokens, marks) in enumerate(micro):
            ids[row, : len(tokens)] = torch.as_tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, : len(tokens)] = torch.where(
                torch.as_tensor(marks), torch.as_tensor(tokens), -100
            )
        # Of the types that a CPU's autocast takes in torch 2.1.2 too, where it stays switched off.
        dtype = torch.float16 if scaler else torch.bfloat16
        with torch.autocast("cpu", dtype=dtype, enabled=scaler is not None):
            loss = peft_model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets
            ).loss
        (scaler.scale(loss) if scaler else loss).backward()
        total += float(loss.detach())
    return total


def stepped(optimizer, parameters, bound: float, scaler) -> bool:
    """Clip the gradients and step; return whether the scaler, if there is one, let it."""
    if scaler is None:
        torch.nn.utils.clip_grad_norm_(parameters, bound)
        optimizer.step()
        optimizer.zero_grad()
        return True
    before = scaler.get_scale()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, bound)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return scaler.get_scale() >= before


# transformers 4.50 computes every layer's attention in the window that Qwen 2 has in its last
# ones only; packing gives each layer its own, is found to differ, and is not used.
WINDOW_IN_EVERY_LAYER = {"qwen2-window"} if MAJOR < 5 else set()


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_every_family_equals_plain_transformers(family, padding_free, tmp_path):
    if padding_free and family in WINDOW_IN_EVERY_LAYER:
        pytest.skip("test_packing_is_proven_on_every_family shows that it is padded")
    rows, lora = make_rows(), LoraSection(lora_r=4, lora_alpha=8)
    losses, adapter, sampler = ours(
        tiny_model(family), rows, tmp_path, padding_free=padding_free, lora=lora
    )
    expected, expected_adapter = plain(tiny_model(family), rows, sampler, lora=lora)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert adapter.keys() == expected_adapter.keys()
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, expected_adapter[name], rtol=1e-4, atol=1e-4)
    assert losses[-1] < losses[0]


def test_a_head_that_is_trained_in_full_equals_plain_transformers(tmp_path):
    lora = LoraSection(lora_r=4, lora_alpha=8, modules_to_save=["lm_head"])
    rows = make_rows()
    losses, adapter, sampler = ours(
        tiny_model("llama"), rows, tmp_path, padding_free=True, lora=lora
    )
    expected, expected_adapter = plain(tiny_model("llama"), rows, sampler, lora=lora)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, expected_adapter[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputing_activations_changes_no_loss(family, tmp_path):
    rows, lora = make_rows(), LoraSection(lora_r=4, lora_alpha=8, lora_dropout=0.1)
    results = []
    for has_checkpointing in (False, True):
        # Dropout draws from the global generator, as a run's does.
        model = tiny_model(family)
        torch.manual_seed(1)
        own = {"has_checkpointing": has_checkpointing}
        results.append(ours(model, rows, tmp_path, padding_free=True, lora=lora, own=own))
    (plain_losses, plain_adapter, _), (losses, adapter, _) = results
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    for name, weights in adapter.items():
        torch.testing.assert_close(weights, plain_adapter[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_proven_on_every_family(family):
    causal = CausalLM(
        tiny_model(family), device="cpu", padding_free=True, chunk=16, precision="float32"
    )
    if family in WINDOW_IN_EVERY_LAYER:
        assert verify(causal).startswith("padding is used")
        return
    assert verify(causal) == ""
    assert causal.packed is not None


def test_a_head_that_does_something_unknown_is_left_to_the_models_own_forward():
    model = tiny_model("llama")
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    batch = MicroBatch(*zip(*make_rows(5), strict=True))
    expected = causal.score(batch)
    causal.head = replace(causal.head, multiplier=1.5)
    assert "decoder and head, called separately, differ" in verify(causal)
    assert causal.score(batch) == pytest.approx(expected, rel=1e-5)


def test_packing_that_differs_falls_back_to_padding():
    causal = CausalLM(
        tiny_model("llama"), device="cpu", padding_free=True, chunk=16, precision="float32"
    )

    class Forgetful(attention.PackedAttention):
        """Attends across the borders of examples."""

        def __call__(self, module, query, *others, **arguments):
            self.lengths = [query.shape[2]]
            return super().__call__(module, query, *others, **arguments)

    broken = Forgetful()
    attention._register(ALL_ATTENTION_FUNCTIONS, broken)
    causal.packed = broken
    assert "padding is used" in verify(causal)
    assert causal.packed is None


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_chunked():
    batch = MicroBatch(*zip(*make_rows(5), strict=True))
    losses = []
    for chunk in (1, 7, 1000):
        causal = CausalLM(
            tiny_model("gemma2"), device="cpu", padding_free=True, chunk=chunk, precision="float32"
        )
        losses.append(causal.score(batch)[0])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
