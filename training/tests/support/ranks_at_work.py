"""What the ranks of `test_ranks` do, in a module that the fork server imports once for all.

What libraries would import at their first use is imported here too: in each process it
took 8 s for a second's work.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama

from lora_trainer.config.schema import Config, LoraSection, ModelSection
from lora_trainer.data.batches import Sampler
from lora_trainer.machine import Machine
from lora_trainer.memory_estimate import DataProfile, ModelSize, Parallelism
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.compat import enable_checkpointing
from lora_trainer.model.forward import CausalLM
from lora_trainer.model.gather import GatheredLayers
from lora_trainer.model.load import ModelSource, load_model
from lora_trainer.model.ranks import PeerLostError, Ranks
from lora_trainer.model.shard import choose_sharder
from lora_trainer.model.targets import fused_names
from lora_trainer.plan import make_plan
from lora_trainer.run.events import Evaluated, MemoryReduced, RanksMeasured, StepDone
from lora_trainer.train import loop
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.loop import TrainingContext, train
from lora_trainer.train.optim import make_optimizer
from support.families import VOCABULARY, tiny_model
from support.plain_peft import SETTINGS, ListRows, make_rows

with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401
    import transformers.integrations.bitsandbytes  # noqa: F401

OWN = {
    "per_device_train_batch_size": 2,
    "train_batch_size": 6,
    "max_tokens_per_micro_batch": 0,
    "max_steps": 12,
}


def make_context(ranks: Ranks, folder: Path, parallelism: Parallelism, own: dict) -> Any:
    known = SETTINGS | OWN | own
    family, dropout = known.pop("family", "llama"), known.pop("dropout", 0.0)
    has_checkpointing, bits = known.pop("has_checkpointing", False), known.pop("bits", 0)
    is_gathered = known.pop("is_gathered", bits > 0)
    rows = make_rows()
    base = tiny_model(family) if not bits else quantized_model(family, bits, folder, ranks)
    lora = LoraSection(
        lora_r=4,
        lora_dropout=dropout,
        use_dora=known.pop("use_dora", False),
        lora_target_parameters=fused_names(base),
    )
    dtype = known.pop("dtype", "float32")
    model = add_adapter(base.to(getattr(torch, dtype)) if not bits else base, lora, seed=11)
    config = Config.model_validate({"training": known, "output": {"save_steps": 0}})
    if has_checkpointing:
        enable_checkpointing(base, lets_go=parallelism == "deepspeed")
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=7, precision=dtype)
    if (parallelism, dtype) == ("deepspeed", "float16"):
        allow_float16_on_a_cpu()
    if parallelism in ("fsdp", "deepspeed"):
        training = config.training
        causal.shard(choose_sharder(parallelism, training, "cpu", ranks, is_packed=is_gathered))
    parameters = trainable_parameters(model)
    plan = make_plan(
        config,
        Machine(cores=1, memory_bytes=1 << 34, gpus=()),
        ModelSize("tiny", 2, 32, VOCABULARY, 1, 1, 128),
        DataProfile(len(rows), 1, 1, 20, eval_rows=9),
        precision=dtype,
        attention="packed",
        padding_free=True,
        processes=ranks.count,
        parallelism=parallelism,
    )
    events: list[Any] = []
    context = TrainingContext(
        causal=causal,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.training),
        sampler=Sampler(len(rows), plan.step_examples, seed=5),
        rows=rows,
        eval_rows=ListRows(rows[:9]),
        store=CheckpointStore(folder / "checkpoints", keep=1, digest="x"),
        plan=plan,
        training=config.training,
        logging_steps=1,
        emit=events.append,
        should_stop=ranks.agreed(lambda: False),
        ranks=ranks,
    )
    return context, events


def allow_float16_on_a_cpu() -> None:
    """Let DeepSpeed do on this CPU, slowly, what it does on a GPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def quantized_model(family: str, bits: int, folder: Path, ranks: Ranks) -> Any:
    """Return the family's model, its layers packed by bitsandbytes."""
    base = folder / "base"
    with ranks.first_then_others():
        if ranks.is_first:
            tiny_model(family).save_pretrained(base)
    section = ModelSection(model_name_or_path=str(base), **{f"use_{bits}bit": True})
    source = ModelSource(str(base), family)
    return load_model(source, section, dtype=torch.float32, device="cpu", attention="eager")


def trained(ranks: Ranks, folder: Path, parallelism: Parallelism, own: dict) -> dict[str, Any]:
    """Train; return the losses, evaluations and figures that were told, and the adapter."""
    overflow_step = own.get("overflow_step", 0)
    own = {key: value for key, value in own.items() if key != "overflow_step"}
    context, events = make_context(ranks, folder, parallelism, own)
    if overflow_step:
        overflow_on_the_last_rank(context, overflow_step)
    state = train(context, TrainState())
    measured = [event for event in events if isinstance(event, RanksMeasured)]
    return {
        "step": state.step,
        "scale": asdict(state.loss_scale) if state.loss_scale else None,
        "losses": [event.loss for event in events if isinstance(event, StepDone)],
        "evals": [event.eval_loss for event in events if isinstance(event, Evaluated)],
        "ranks": [event.ranks for event in measured],
        "slowest": [event.slowest for event in measured],
        "held": sum(map(held, context.causal.decoder.layers.parameters())),
        "adapter": {name: p.detach().clone() for name, p in context.parameters.items()},
    }


def overflow_on_the_last_rank(context: Any, at_step: int) -> None:
    """Make one gradient of the last rank infinite, when it first computes this step."""
    sound, ranks = loop.sum_step, context.ranks
    seeds: list[int] = []

    def sum_step(*arguments: Any) -> Any:
        seeds.append(1)
        if len(seeds) == at_step and ranks.rank == ranks.count - 1:
            arguments[1][0].grad[0, 0] = float("inf")
        return sound(*arguments)

    loop.sum_step = sum_step  # type: ignore[assignment]


def short_of_memory(ranks: Ranks, folder: Path, own: dict) -> dict[str, Any]:
    """Train where the last rank has memory for one example at a time alone."""
    context, events = make_context(ranks, folder, "ddp", own)
    kept: list[Any] = []
    causal = context.causal
    sound_loss, sound_score, failed = causal.loss, causal.score, []

    def loss(batch: Any, factor: float) -> Any:
        fits(batch)
        return sound_loss(batch, factor)

    def score(batch: Any) -> Any:
        fits(batch)
        return sound_score(batch)

    def fits(batch: Any) -> None:
        if ranks.rank == ranks.count - 1 and len(batch.ids) > 1:
            failed.append(len(batch.ids))
            raise MemoryError

    causal.loss, causal.score = loss, score
    state = train(replace(context, keep_limits=kept.append), TrainState())
    return {
        "step": state.step,
        "losses": [event.loss for event in events if isinstance(event, StepDone)],
        "evals": [event.eval_loss for event in events if isinstance(event, Evaluated)],
        "adapter": {name: p.detach().clone() for name, p in context.parameters.items()},
        "kept": [asdict(one) for one in kept],
        "failed": failed,
        "reduced": [e.micro_batch_examples for e in events if isinstance(e, MemoryReduced)],
    }


def held(parameter: torch.nn.Parameter) -> int:
    """Return how many numbers of a frozen matrix this rank has."""
    if parameter.requires_grad:
        return 0
    if hasattr(parameter, "ds_id"):
        # Its part, and what was not let go of.
        own = parameter.ds_tensor.numel() + parameter.numel()
        return own if len(parameter.ds_shape) > 1 else 0
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return own.numel() if parameter.dim() > 1 else 0


def gathered(ranks: Ranks) -> dict[str, Any]:
    """Share a model's layers out; return what this rank keeps, and what it finds when."""
    base = tiny_model("llama")
    layers = base.model.layers
    before = [p.detach().clone() for p in layers[1].parameters()]
    shared = GatheredLayers(layers, "cpu", ranks)
    released = [p.numel() for p in layers.parameters()]
    seen: list[bool] = []

    def look(*_: Any) -> None:
        pairs = zip(layers[1].parameters(), before, strict=True)
        seen.append(all(torch.equal(now, then) for now, then in pairs))
        seen.append(all(p.numel() == 0 for p in layers[0].parameters()))

    layers[1].self_attn.register_forward_hook(look)
    base(input_ids=torch.arange(5)[None])
    return {"kept": shared.kept_bytes, "released": released, "seen": seen}


def stopped(ranks: Ranks, folder: Path) -> int:
    """Train until a signal reaches the last rank alone; return the step of the end."""
    context, events = make_context(ranks, folder, "ddp", {})

    def is_told() -> bool:
        return ranks.rank == ranks.count - 1 and len(events) >= 8

    return train(replace(context, should_stop=ranks.agreed(is_told)), TrainState()).step


def left_alone(ranks: Ranks) -> str:
    """Meet and end, but on rank 0, which waits on; return what it then learns."""
    ranks.wait()
    if not ranks.is_first:
        return ""
    try:
        ranks.wait()
    except PeerLostError:
        return "lost"
    return "met"


def turns(ranks: Ranks, folder: Path) -> None:
    """Write down who was first, and who was in turn."""
    with ranks.first_then_others():
        note(folder / "first", ranks.rank)
    with ranks.in_turn():
        note(folder / "turn", ranks.rank)


def note(path: Path, rank: int) -> None:
    with path.open("a") as file:
        file.write(str(rank))


def untouched(ranks: Ranks) -> list[bool]:
    """Sum a step in which one parameter has a gradient on one rank, another on none."""
    from lora_trainer.model.ranks import sum_step
    from lora_trainer.run.events import RankFigures

    seen, unseen = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    if ranks.rank == 1:
        seen.grad = torch.ones(2)
    own = RankFigures(rank=ranks.rank, seconds=1.0, tokens=1, memory_bytes=1024)
    sum_step(ranks, [seen, unseen], torch.zeros(()), own)
    return [seen.grad is not None, unseen.grad is not None]
