"""`TrainingSetup`: everything a run needs, ready to train; `session.py` builds it.

Its methods are a run's operations besides training: restore, make the loop's context, export.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoint_folder import CorruptCheckpointError
from ..config.schema import Config
from ..data.batches import RowView, Sampler
from ..data.prepare import DataSplits
from ..data.prompt_format import PromptFormat
from ..errors import StorageError
from ..host.disk import write_json
from ..model import load, zero
from ..model.adapter import adapter_state, load_adapter_state
from ..model.forward import CausalLM
from ..model.ranks import ALONE, Ranks
from ..plan import Plan, limited
from ..report import model_card
from ..run.events import Event, Planned, Warned
from ..run.memory_limits import MemoryLimits, write_limits
from ..run.protocol import WorkerSpec
from ..run_folder import RunFolder
from . import export
from .card_facts import card_facts
from .checkpoint import Snapshot, TrainState, misfit, restore_generators, restore_optimizer
from .checkpoint_store import CheckpointStore, OtherRunError
from .datasets import (
    format_of_splits,
    name_rows,
)
from .initial import Initial, verified
from .loop import TrainingContext
from .smaller_plans import is_tight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "datasets")


@dataclass
class TrainingSetup:
    """Everything a run needs, ready to train; created by `session`."""

    config: Config
    plan: Plan
    causal: CausalLM
    tokenizer: PreTrainedTokenizerBase
    source: load.ModelSource
    splits: DataSplits
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]
    store: CheckpointStore
    output_dir: Path
    initial: Initial | None = None
    start: dict[str, torch.Tensor] | None = None  # weights of the adapter that training starts from
    ranks: Ranks = ALONE
    with_smaller_plans: Callable[[Plan], Plan] = lambda plan: plan
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def eval_rows(self) -> RowView:
        """Return the held-out rows; none where there is no such data."""
        rows = self.splits.eval if self.splits.eval is not None else self.splits.train
        return RowView(rows, self.splits.eval_rows)

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """Return how the rows ask, and what ends their answers."""
        return format_of_splits(self.splits, self.tokenizer)

    @cached_property
    def stops(self) -> list[int]:
        """Return the ids of the tokens that end an answer."""
        return self.prompt_format.stops(self.tokenizer, self.causal.inner.generation_config)

    @property
    def data_facts(self) -> dict[str, Any]:
        """Return what became of the data, for data.json."""
        facts = {"train": asdict(self.splits.train_report) | {"rows_trained": self.sampler.rows}}
        if self.splits.eval_report is not None:
            facts["eval"] = asdict(self.splits.eval_report)
        return facts | {"answers": asdict(self.prompt_format)}

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions and the machine that the result depends on."""
        extra = (zero.PACKAGE,) if self.plan.parallelism == "deepspeed" else ()
        versions = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *extra)}
        return versions | {"machine": platform.machine(), "system": platform.system()}

    def keep_figures(self, figures: dict[str, float]) -> None:
        """Keep the newest figures, for the model card."""
        self.figures |= figures
        if "eval_loss" in figures:
            for name, value in figures.items():
                self.figures.setdefault(f"{name}_before", value)

    def restore(
        self, snapshot: Snapshot | None, emit: Callable[[Event], None] = lambda _: None
    ) -> TrainState:
        """Continue from a checkpoint, or seed a fresh start."""
        if self.initial is not None and self.ranks.is_first:
            expected = snapshot.initial if snapshot else ""
            if warning := self.initial.settle(self.causal.model, expected):
                emit(Warned(message=warning))
            self.store.initial = expected or self.initial.digest
        if snapshot is None:
            seed = self.config.training.seed
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            return TrainState()
        load_adapter_state(self.causal.model, snapshot.adapter)
        restore_optimizer(snapshot, self.optimizer, self.parameters)
        restore_generators(snapshot)
        return snapshot.state

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """Compute as before training: with the adapter that it started from, if any, or none."""
        model = self.causal.model
        if self.start is None:
            with model.disable_adapter():
                yield
            return
        current = adapter_state(model)
        load_adapter_state(model, self.start)
        try:
            yield
        finally:
            load_adapter_state(model, current)

    def refuse(self, snapshot: Snapshot) -> str:
        """Return why a sound checkpoint cannot be resumed from; nothing if it can."""
        best = self._best_apart(snapshot.state)
        try:
            if best is not None:
                self.store.state_of(best)
        except (CorruptCheckpointError, OtherRunError) as error:
            return f"its best checkpoint, {best.name if best else ''}, is not sound: {error}"
        return misfit(snapshot, self.parameters)

    def take_best(self, state: TrainState) -> int:
        """Put the best checkpoint's adapter in place, if the config wants it exported.

        Returns the step of the adapter that is in place.

        Raises:
            StorageError: the best checkpoint is not sound.
        """
        best = self._best_apart(state)
        if best is None:
            return state.step
        try:
            load_adapter_state(self.causal.model, self.store.read(best).adapter)
        except (CorruptCheckpointError, OtherRunError, ValueError) as error:
            raise StorageError.of(
                "the best checkpoint is damaged",
                where=str(best),
                why=f"{error}; load_best_model_at_end would export this one",
                remedy="run the same command again: the run resumes from a valid checkpoint and "
                "repeats the steps after it",
            ) from error
        assert state.best_step is not None
        return state.best_step

    def _best_apart(self, state: TrainState) -> Path | None:
        """Return the best checkpoint where it is exported and is not the one of this state."""
        is_wanted = self.config.training.load_best_model_at_end
        if not is_wanted or state.best_step in (None, state.step):
            return None
        assert state.best_step is not None
        return self.store.path_of(state.best_step)

    def context(
        self,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        unrecorded: Callable[[], Callable[[], Sequence[str]]] = lambda: tuple,
    ) -> TrainingContext:
        """Return what the loop drives."""
        return TrainingContext(
            causal=self.causal,
            parameters=self.parameters,
            optimizer=self.optimizer,
            sampler=self.sampler,
            rows=self.splits.train,
            eval_rows=self.eval_rows,
            store=self.store,
            plan=self.plan,
            training=self.config.training,
            logging_steps=self.config.monitoring.logging_steps,
            emit=emit,
            should_stop=should_stop,
            ranks=self.ranks,
            unrecorded=unrecorded,
            name_rows=self.name_rows,
            keep_limits=lambda limits: self.keep_limits(limits, emit),
        )

    def keep_limits(self, limits: MemoryLimits, emit: Callable[[Event], None]) -> None:
        """Keep what the run was cut down to when memory ran out, here and for later starts.

        With nothing left to reduce, what else would fit is reported as well.
        """
        self.plan = limited(self.plan, limits)
        if is_tight(self.plan) and not self.plan.least_memory_bytes:
            self.plan = self.with_smaller_plans(self.plan)
            emit(Planned(plan=self.plan.to_dict()))
        write_limits(self.output_dir, limits)
        write_json(RunFolder(self.output_dir).plan, self.plan.to_dict())

    def name_rows(self, indices: Sequence[int], is_held_out: bool) -> list[str]:
        """Name tokenized rows by file and line, as far as the datasets still tell."""
        index = self.splits.eval_rows if is_held_out else np.arange(len(self.splits.train))
        data = self.splits.eval if is_held_out and self.splits.eval else self.splits.train
        return name_rows(self.config, data, [int(index[one]) for one in indices])

    def export(self, spec: WorkerSpec, state: TrainState) -> Path:
        """Write final_model/."""
        if self.source.hub_id:
            # A path on this machine means nothing elsewhere.
            self.causal.model.peft_config["default"].base_model_name_or_path = self.source.hub_id
        return export.export(
            self.causal.model,
            self.tokenizer,
            self.output_dir,
            spec.redaction.event(card_facts(self, spec.run_name, state)),
            self.prompt_format,
            verified(self.initial.folder, self.store.initial) if self.initial else None,
        )

    def write_card(self, spec: WorkerSpec, state: TrainState) -> None:
        """Write the model card again, with the figures that came after the export."""
        model_card.write_model_card(
            RunFolder(self.output_dir).final_model / export.CARD,
            spec.redaction.event(card_facts(self, spec.run_name, state)),
        )
