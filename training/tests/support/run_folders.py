"""A run's folder as training leaves it, made in a second: tiny base model, random adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_trainer.config.schema import Config
from lora_trainer.config.settings import resolve
from lora_trainer.host.disk import write_json
from lora_trainer.model.adapter import (
    adapter_state,
    add_adapter,
    changes_base,
    trainable_parameters,
)
from lora_trainer.model.compat import dtype_argument
from lora_trainer.report.model_card import CardFacts, write_model_card
from lora_trainer.run.events import Evaluated
from lora_trainer.run_folder import RunFolder
from lora_trainer.train import initial as initials
from lora_trainer.train.checkpoint import TrainState, take_snapshot
from lora_trainer.train.checkpoint_store import CheckpointStore
from lora_trainer.train.export import save_adapter
from lora_trainer.train.optim import make_optimizer
from support.tiny_model import write_model, write_rows

STEP = 7


def make_run(root: Path, *keys: str, is_finished: bool = True) -> Path:
    """Make `root`/run; `keys` are options of the command line. Return its folder."""
    if not (root / "model").exists():
        write_model(root / "model")
        write_rows(root / "held-out.jsonl", 900, 6)
    run = root / "run"
    run.mkdir()
    settings = resolve(
        None,
        {},
        [
            f"--model_name_or_path={root / 'model'}",
            f"--dataset={root / 'held-out.jsonl'}",
            f"--dataset_cache_dir={root / 'cache'}",
            f"--output_dir={run}",
            "--preprocessing_num_workers=1",
            "--eval_max_new_tokens=8",
            "--lora_r=4",
            *keys,
        ],
    )
    write_json(RunFolder(run).resolved, settings.redacted())
    model = adapted(root / "model", settings.config)
    is_converted = changes_base(settings.config.lora)
    initial = initials.save(model, run / "initial_adapter") if is_converted else None
    shake(model)
    _save_checkpoint(run, model, settings.config)
    if is_finished:
        save_adapter(model, run / "final_model", initial)
        AutoTokenizer.from_pretrained(root / "model").save_pretrained(run / "final_model")
        facts = CardFacts(run_name="run", base_model="model", train_rows=6, data_digest="abc")
        write_model_card(run / "final_model" / "README.md", facts)
    return run


def adapted(base: Path, config: Config):
    """Return the base model with a fresh adapter, as training begins."""
    model = AutoModelForCausalLM.from_pretrained(base, **dtype_argument(torch.float32))
    model.requires_grad_(False)
    return add_adapter(model, config.lora, seed=1).eval()


def shake(model) -> None:
    """Give every trained parameter another value, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits_of(model) -> torch.Tensor:
    """Return the model's logits on some tokens."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


def _save_checkpoint(run: Path, model, config: Config) -> None:
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(parameters, config.training)
    store = CheckpointStore(run / "checkpoints", keep=3, digest="made")
    state = TrainState(step=STEP, train_seconds=1.0)
    store.save(take_snapshot(state, adapter_state(model), optimizer, parameters, "made"))
    scored = Evaluated(
        step=STEP, eval_loss=0.5, eval_perplexity=1.6, eval_token_accuracy=0.9, eval_tokens=9,
        eval_seconds=1.0,
    )  # fmt: skip
    (run / "events.jsonl").write_text(scored.to_line() + "half a li")
