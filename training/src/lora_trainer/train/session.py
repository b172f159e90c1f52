"""Bring up a session: tokenizer, data, base model, adapter, plan, in the order that fails first.

Data is read before the weights are: a bad row is told in seconds, not after a download.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint_folder import CorruptCheckpointError
from ..config.schema import Config
from ..config.start_adapter import find_adapter
from ..data.batches import RowView, Sampler
from ..data.prepare import DataSplits
from ..data.prompt_format import PromptFormat
from ..errors import StorageError
from ..machine import Machine, read_machine
from ..model import determinism, flash, load, loftq, probe, quantize, reach, zero
from ..model.adapter import (
    add_adapter,
    changes_base,
    load_adapter_state,
    load_start,
    trainable_parameters,
)
from ..model.backend import resolve, usable_machine
from ..model.compat import enable_checkpointing
from ..model.forward import CausalLM
from ..model.ranks import ALONE, Ranks
from ..model.shard import choose_sharing
from ..plan import Plan, limited, make_plan
from ..report import model_card
from ..run.events import Event, PhaseChanged, Warned
from ..run.folder import FINAL, write_json
from ..run.memory_limits import MemoryLimits, read_limits, write_limits
from . import export
from .card_facts import card_facts
from .checkpoint import Snapshot, TrainState, misfit, restore_generators, restore_optimizer
from .checkpoint_store import CheckpointStore, OtherRunError
from .datasets import (
    data_digest,
    data_warnings,
    end_warning,
    format_of_splits,
    name_rows,
    open_data,
    profile_of,
    refuse_long_rows,
    rows_of_epoch_in,
    rows_to_train,
    source_specs,
)
from .dry_run import parallelism_before_loading, refuse_unsupported, shape_of
from .identity import BaseHash, check_adapter_base, digest_of
from .initial import FOLDER, Initial, verified, weights_digest
from .loop import TrainingContext
from .optim import make_optimizer
from .smaller_plans import with_smaller_plans

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "datasets")


@dataclass
class TrainingSetup:
    """Everything that a run works with, ready to train."""

    config: Config
    plan: Plan
    causal: CausalLM
    tokenizer: Any
    source: load.ModelSource
    splits: DataSplits
    order: Sampler
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]
    store: CheckpointStore
    output_dir: Path
    initial: Initial | None = None
    ranks: Ranks = ALONE
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
        facts = {"train": asdict(self.splits.train_report) | {"rows_trained": self.order.rows}}
        if self.splits.eval_report is not None:
            facts["eval"] = asdict(self.splits.eval_report)
        return facts | {"answers": asdict(self.prompt_format)}

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions and the machine that the result depends on."""
        extra = (zero.PACKAGE,) if self.plan.parallelism == "deepspeed" else ()
        found = {name: importlib.metadata.version(name) for name in (*LIBRARIES, *extra)}
        return found | {"machine": platform.machine(), "system": platform.system()}

    def note(self, figures: dict[str, float]) -> None:
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

    def refuse(self, snapshot: Snapshot) -> str:
        """Return why a sound checkpoint cannot be resumed from; nothing if it can."""
        best = self._best_apart(snapshot.state)
        try:
            if best is not None:
                self.store.state_of(best)
        except (CorruptCheckpointError, OtherRunError) as error:
            return f"its best checkpoint, {best.name if best else ''}, is not sound: {error}"
        return misfit(snapshot, self.parameters)

    def take_best(self, state: TrainState) -> None:
        """Put the best checkpoint's adapter in place, if the config wants it exported.

        Raises:
            StorageError: the best checkpoint is not sound.
        """
        best = self._best_apart(state)
        if best is None:
            return
        try:
            load_adapter_state(self.causal.model, self.store.read(best).adapter)
        except (CorruptCheckpointError, OtherRunError, ValueError) as error:
            raise StorageError.of(
                "the best checkpoint is damaged",
                where=str(best),
                why=f"{error}; load_best_model_at_end exports this one",
                remedy="start the same command again: the run goes back to a sound checkpoint and "
                "trains the steps after it again",
            ) from error

    def _best_apart(self, state: TrainState) -> Path | None:
        """Return the best checkpoint where it is exported and is not the one of this state."""
        is_wanted = self.config.training.load_best_model_at_end
        if not is_wanted or state.best_step in (None, state.step):
            return None
        assert state.best_step is not None
        return self.store.path_of(state.best_step)

    def parts(
        self,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        unrecorded: Callable[[], Sequence[str]] = tuple,
    ) -> TrainingContext:
        """Return what the loop drives."""
        return TrainingContext(
            causal=self.causal,
            parameters=self.parameters,
            optimizer=self.optimizer,
            order=self.order,
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
            keep_limits=self.keep_limits,
        )

    def keep_limits(self, limits: MemoryLimits) -> None:
        """Keep what the run was cut down to when memory ran out, here and for later starts."""
        self.plan = limited(self.plan, limits)
        write_limits(self.output_dir, limits)
        write_json(self.output_dir / "plan.json", self.plan.to_dict())

    def name_rows(self, indices: Sequence[int], is_held_out: bool) -> list[str]:
        """Name tokenized rows by file and line, as far as the datasets still tell."""
        index = self.splits.eval_rows if is_held_out else np.arange(len(self.splits.train))
        data = self.splits.eval if is_held_out and self.splits.eval else self.splits.train
        return name_rows(self.config, data, [int(index[one]) for one in indices])

    def export(self, order: Any, state: TrainState) -> Path:
        """Write final_model/."""
        if self.source.hub_id:
            # The folder that it was loaded from is this machine's affair.
            self.causal.model.peft_config["default"].base_model_name_or_path = self.source.hub_id
        return export.export(
            self.causal.model,
            self.tokenizer,
            self.output_dir,
            order.redaction.event(card_facts(self, order.run_name, state)),
            self.prompt_format,
            verified(self.initial.folder, self.store.initial) if self.initial else None,
        )

    def write_card(self, order: Any, state: TrainState) -> None:
        """Write the model card again, with the figures that came after the export."""
        model_card.write_model_card(
            self.output_dir / FINAL / export.CARD,
            order.redaction.event(card_facts(self, order.run_name, state)),
        )


def open_session(
    config: Config,
    output_dir: Path,
    emit: Callable[[Event], None],
    ranks: Ranks = ALONE,
    machine: Machine | None = None,
) -> TrainingSetup:
    """Prepare data and model; every fault that a user can cause comes out as a TrainerError.

    Rank 0 downloads and tokenizes; the others find what it left. `machine` is the usable one,
    where it is known already.
    """
    machine = machine or usable_machine(read_machine(), ranks.count)
    config_digest = config.digest()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, machine.cores // ranks.count))
    with ranks.first_then_others():
        source = load.locate(config.model)
        tokenizer = load.load_tokenizer(source, config.model)
        shape = load.load_config(source, config.model)
        config, whole = quantize.apply_stored_quantization(config, shape, has_gpu=machine.has_gpu)
        emit(PhaseChanged(phase="tokenizing"))
        splits = open_data(config, source, tokenizer, emit)
    load.use_template(tokenizer, config.data.chat_template)
    emit(PhaseChanged(phase="loading", detail=source.name))
    for warning in data_warnings(config, splits):
        emit(Warned(message=warning))
    session = _open_model(
        config, machine, source, shape, tokenizer, splits, output_dir, ranks, config_digest
    )
    if whole:
        session.plan = replace(session.plan, reasons=(whole, *session.plan.reasons))
    ends = end_warning(
        session.prompt_format, session.tokenizer, session.causal.inner.generation_config
    )
    for reason in (*session.plan.reasons, *ends):
        emit(Warned(message=reason))
    return session


def _open_model(
    config: Config,
    machine: Machine,
    source: load.ModelSource,
    shape: Any,
    tokenizer: Any,
    splits: DataSplits,
    output_dir: Path,
    ranks: Ranks,
    config_digest: str,
) -> TrainingSetup:
    backend = resolve(config.model, machine, shape, ranks)
    if not config.model.trust_remote_code:  # whose classes may need what is in their repository
        refuse_unsupported(config, shape)
    parallelism, chosen = parallelism_before_loading(config, backend, shape, ranks)
    share = None
    if parallelism in ("fsdp", "deepspeed"):
        zero.check(config) if parallelism == "deepspeed" else quantize.check_sharing(config)
        is_packed = quantize.is_quantized(config.model)
        share = choose_sharing(
            parallelism, config.training, backend.device, ranks, is_packed=is_packed
        )
    # Before it is loaded where it is here already: both then read the same bytes.
    base_hash = None
    if source.is_local and ranks.is_first:
        base_hash = BaseHash(Path(source.path), config.model)
    # Where the base does not fit on a device, a copy for each rank may not fit in memory; but
    # DeepSpeed has all ranks compare theirs, one weight after the other.
    with ranks.in_turn() if parallelism == "fsdp" else contextlib.nullcontext():
        base = load.load_model(
            source,
            config.model,
            dtype=backend.dtype,
            # It goes to the device layer by layer, while these are shared out.
            device=backend.place if share is None else "cpu",
            attention=backend.attention,
        )
        refuse_long_rows(config, base, splits)
        parameters = quantize.count_parameters(base)
        model = add_adapter(base, config.lora, seed=config.training.seed)
        if config.lora.adapter_name_or_path is not None:
            load_start(model, find_adapter(config.lora.adapter_name_or_path))
        if config.lora.init_lora_weights == loftq.INIT:
            loftq.begin_from_residuals(model, load.weights_folder(source, config.model))
        initial = None
        if changes_base(config.lora):
            initial = Initial(output_dir / FOLDER, weights_digest(trainable_parameters(model)))
        causal = CausalLM(
            model,
            device=backend.place,
            padding_free=config.training.padding_free is not False,
            chunk=config.training.loss_chunk_tokens,
            precision=backend.precision,
            kernel=backend.kernel,
        )
        trained = trainable_parameters(model)
        shape_of_base = shape_of(base, parameters, trained)
        if share is not None:
            causal.shard(share)
    named = zero.names_what_it_cannot if parallelism == "deepspeed" else contextlib.nullcontext
    with named():
        fallback = probe.verify(causal, ranks.is_any)
        varying = ""
        if machine.has_gpu:
            varying = determinism.require(lambda: probe.exercise(causal))
    reached = reach.notes(model, parameters[0], config.lora)
    if backend.kernel is not None and (causal.packed is None or causal.packed.kernel is None):
        if config.model.use_flash_attention == flash.STRICT:
            raise flash.refusal(fallback)
        backend = backend.without_kernel()
    weights = [source.weight for source in source_specs(config, config.data.dataset)]
    rows_of_epoch = rows_of_epoch_in(splits, weights, config.training.seed)
    profile = profile_of(splits, rows_to_train(rows_of_epoch))
    plan = make_plan(
        config,
        machine,
        shape_of_base,
        profile,
        precision=backend.precision,
        attention=backend.attention if causal.packed is None else backend.packed,
        padding_free=causal.packed is not None,
        processes=ranks.count,
        parallelism=parallelism,
        limits=read_limits(output_dir),
        reasons=(*backend.reasons, *filter(None, (chosen, fallback, varying, *reached))),
    )
    plan = with_smaller_plans(plan, config, shape_of_base, profile)
    if plan.gradient_checkpointing:
        enable_checkpointing(base, lets_go=parallelism == "deepspeed")
    if base_hash is None and ranks.is_first:
        base_hash = BaseHash(load.weights_folder(source, config.model), config.model)

    uncompared = "" if base_hash is None else check_adapter_base(config, base_hash)
    if uncompared:
        plan = replace(plan, reasons=(*plan.reasons, uncompared))
    digest: str | Callable[[], str] = ""  # which rank 0 compares for all
    if base_hash is not None:
        digest = digest_of(config, config_digest, base_hash, data_digest(splits, weights), plan)
    return TrainingSetup(
        config=config,
        plan=plan,
        causal=causal,
        tokenizer=tokenizer,
        source=source,
        splits=splits,
        order=Sampler(plan.rows, plan.step_examples, config.training.seed, rows_of_epoch),
        optimizer=make_optimizer(trained, config.training, config.lora.loraplus_lr_ratio),
        parameters=trained,
        store=CheckpointStore(
            output_dir / "checkpoints",
            keep=config.output.save_total_limit,
            digest=digest,
        ),
        output_dir=output_dir,
        initial=initial,
        ranks=ranks,
    )
