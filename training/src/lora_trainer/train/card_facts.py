"""Collect the facts for a run's model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ..config.schema import Config
from ..data.batches import Sampler
from ..data.prepare import DataSplits
from ..data.prompt_format import PromptFormat
from ..model import load, loftq
from ..plan import Plan
from ..report import model_card
from . import export
from .checkpoint import TrainState
from .datasets import hub_ids, profile_of
from .identity import adapter_note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Setup(Protocol):
    """What of `setup.TrainingSetup` is looked at here."""

    config: Config
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    source: load.ModelSource
    splits: DataSplits
    sampler: Sampler

    @property
    def figures(self) -> Mapping[str, float]: ...
    @property
    def prompt_format(self) -> PromptFormat: ...
    @property
    def stops(self) -> list[int]: ...
    @property
    def versions(self) -> dict[str, str]: ...


def card_facts(setup: _Setup, run_name: str, state: TrainState) -> model_card.CardFacts:
    """Return what the card states of a run at `state`."""
    config, figures = setup.config, setup.figures
    profile = profile_of(setup.splits, setup.sampler.rows)
    names = ("exact_match", "eval_loss", "eval_perplexity", "eval_token_accuracy")
    after = {n: figures[n] for n in (*names, "loss") if n in figures}
    if "exact_match_after" in figures:
        after["exact_match"] = figures["exact_match_after"]
    if "loss" in after:
        after["train_loss"] = after.pop("loss")
    quantization = "4 bit" if config.model.use_4bit else "8 bit" if config.model.use_8bit else ""
    notes = (setup.source.note, loftq.note(config.lora, config.model))
    facts = model_card.CardFacts(
        run_name=run_name,
        base_model=setup.source.name,
        base_model_hub_id=setup.source.hub_id or None,
        base_model_revision=setup.source.revision,
        base_model_license=load.find_license(setup.source) or None,
        quantization=quantization,
        dataset_hub_ids=hub_ids(config),
        data_digest=setup.splits.train.digest,
        train_rows=setup.sampler.rows,
        train_tokens=profile.tokens,
        supervised_tokens=profile.supervised_tokens,
        eval_rows=profile.eval_rows,
        steps=state.step,
        train_seconds=state.train_seconds,
        trainable_parameters=setup.plan.trainable_parameters,
        config_digest=config.digest(),
        hyperparameters=model_card.shown_keys(config),
        metrics_before={n: figures[f"{n}_before"] for n in names if f"{n}_before" in figures},
        metrics_after=after,
        versions=setup.versions,
        started_from=adapter_note(config),
        use_dora=config.lora.use_dora,
        modules_to_save=tuple(config.lora.modules_to_save),
        target_parameters=tuple(config.lora.lora_target_parameters),
        notes=tuple(n for n in notes if n),
    )
    return export.with_prompt_format(facts, setup.prompt_format, setup.tokenizer, setup.stops)
