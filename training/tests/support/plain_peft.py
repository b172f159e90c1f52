"""The same rows through our loop and through plain transformers + PEFT."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import transformers

from lora_trainer.config.schema import Config, LoraSection
from lora_trainer.data.batches import Sampler
from lora_trainer.machine import Machine
from lora_trainer.memory_estimate import DataProfile, ModelSize
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.compat import enable_checkpointing
from lora_trainer.model.forward import CausalLM
from lora_trainer.plan import make_plan
from lora_trainer.run.events import Event, StepDone
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.loop import TrainingContext, train
from lora_trainer.train.optim import make_optimizer
from support.families import VOCABULARY

STEPS = 20
SETTINGS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_tokens_per_micro_batch": 0,  # as `plain` cuts a step; test_token_batches.py cuts by tokens
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
    precision="float32", is_fused=True,
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
    if not is_fused:
        causal.leave_layers_alone()
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
