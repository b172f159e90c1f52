"""Build a `TrainingSetup` (setup.py): tokenizer, data, base model, adapter, plan.

The cheapest failures come first: data is read before the weights are, so a bad row is reported in
seconds, not after a download.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..batch import RunBatch
from ..config.schema import Config
from ..config.start_adapter import find_adapter
from ..data.batches import Sampler
from ..data.prepare import DataSplits
from ..errors import ConfigError
from ..machine import Machine, read_machine
from ..memory_estimate import ModelSize, Parallelism, loss_chunk
from ..model import determinism, flash, load, loftq, probe, quantize, reach, sizes, zero
from ..model.adapter import (
    adapter_state,
    add_adapter,
    changes_base,
    load_start,
    trainable_parameters,
)
from ..model.backend import Backend, resolve, usable_machine
from ..model.compat import enable_checkpointing
from ..model.forward import CausalLM
from ..model.precision import without_float16
from ..model.ranks import ALONE, Ranks
from ..model.shard import choose_sharder
from ..plan import Plan, make_plan
from ..run.events import Event, PhaseChanged, Warned
from ..run.memory_limits import read_limits, release
from ..run_folder import RunFolder
from .checkpoint_store import CheckpointStore
from .datasets import (
    data_digest,
    data_warnings,
    end_warning,
    open_data,
    profile_of,
    refuse_long_rows,
    rows_of_epoch_in,
    rows_to_train,
    source_specs,
)
from .dry_run import footprint_of, model_size_of, parallelism_before_loading, refuse_unsupported
from .identity import BaseHash, check_adapter_base, digest_of
from .initial import Initial, weights_digest
from .optim import make_optimizer
from .recorded_run import begun_batch
from .setup import TrainingSetup
from .shared_prefix import share_prefixes
from .smaller_plans import is_tight, with_smaller_plans

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

OVERFLOWED = (
    "float32 is used: the base model's own loss is not finite in float16, which ends at 65,504"
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
        base_config = load.load_config(source, config.model)
        config, whole = quantize.apply_stored_quantization(
            config, base_config, has_gpu=machine.has_gpu
        )
        emit(PhaseChanged(phase="tokenizing"))
        splits = open_data(config, source, tokenizer, emit)
    load.use_template(tokenizer, config.data.chat_template)
    emit(PhaseChanged(phase="loading", detail=source.name))
    for warning in data_warnings(config, splits):
        emit(Warned(message=warning))
    opening = (machine, source, base_config, tokenizer, splits, output_dir, ranks, config_digest)
    overflowed = ""
    try:
        session = _open_model(config, *opening)
    except probe.Float16OverflowError:
        overflowed = OVERFLOWED
    if overflowed:  # outside `except`, so that the first model is freed
        release()
        session = _open_model(_in_float32(config), *opening)
    reasons = (*filter(None, (whole, overflowed)), *session.plan.reasons)
    session.plan = replace(session.plan, reasons=reasons)
    ends = end_warning(
        session.prompt_format, session.tokenizer, session.causal.inner.generation_config
    )
    for reason in (*session.plan.reasons, *ends):
        emit(Warned(message=reason))
    return session


def _in_float32(config: Config) -> Config:
    """Return the config of a run whose base model overflows float16.

    Raises:
        ConfigError: float16 is required.
    """
    if config.model.fp16 is True:
        raise ConfigError.of(
            "the base model overflows float16",
            where="fp16",
            why="its own loss on a few tokens is not finite in float16, which ends at 65,504",
            remedy="--fp16 false",
        )
    return config.model_copy(update={"model": without_float16(config.model)})


def _open_model(
    config: Config,
    machine: Machine,
    source: load.ModelSource,
    base_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    splits: DataSplits,
    output_dir: Path,
    ranks: Ranks,
    config_digest: str,
) -> TrainingSetup:
    backend = resolve(config.model, machine, base_config, ranks)
    if not config.model.trust_remote_code:  # whose classes may need what is in their repository
        refuse_unsupported(config, base_config)
    parallelism, chosen = parallelism_before_loading(config, backend, base_config, ranks)
    # Before it is loaded where it is here already: both then read the same bytes.
    base_hash = None
    if source.is_local and ranks.is_first:
        base_hash = BaseHash(Path(source.path), config.model)
    causal, base_size, initial = _load(
        config, backend, parallelism, source, splits, output_dir, ranks
    )
    backend, proven = _prove(config, backend, parallelism, causal, base_size, ranks)
    weights = [source.weight for source in source_specs(config, config.data.dataset)]
    rows_of_epoch = rows_of_epoch_in(splits, weights, config.training.seed)
    profile = profile_of(splits, rows_to_train(rows_of_epoch))
    footprint = footprint_of(
        config,
        backend,
        base_config,
        is_packed=causal.packed is not None,
        kinds_apart=causal.kinds_apart,
    )
    plan = make_plan(
        config,
        backend.machine,
        base_size,
        profile,
        precision=backend.precision,
        attention=backend.attention if causal.packed is None else backend.packed,
        padding_free=causal.packed is not None,
        processes=ranks.count,
        parallelism=parallelism,
        limits=read_limits(output_dir),
        begun=RunBatch(*ranks.of_first(astuple(begun_batch(output_dir)))),
        reasons=(*backend.reasons, *filter(None, (chosen, *proven))),
        count=footprint,
    )

    def smaller(plan: Plan) -> Plan:
        return with_smaller_plans(plan, config, base_size, profile, footprint)

    plan = smaller(plan) if is_tight(plan) else plan
    plan = replace(plan, reasons=(*plan.reasons, *footprint.faults), fused=causal.fused)
    sampler = Sampler(plan.rows, plan.step_examples, config.training.seed, rows_of_epoch)
    plan = share_prefixes(causal, config.training, plan, sampler, splits.train, ranks)
    if plan.gradient_checkpointing:
        enable_checkpointing(causal.inner, lets_go=parallelism == "deepspeed")
    if base_hash is None and ranks.is_first:
        base_hash = BaseHash(load.weights_folder(source, config.model), config.model)
    uncompared = "" if base_hash is None else check_adapter_base(config, base_hash)
    if uncompared:
        plan = replace(plan, reasons=(*plan.reasons, uncompared))
    digest: str | Callable[[], str] = ""  # which rank 0 compares for all
    if base_hash is not None:
        digest = digest_of(config, config_digest, base_hash, data_digest(splits, weights), plan)
    parameters = trainable_parameters(causal.model)
    starts_from_adapter = config.lora.adapter_name_or_path is not None
    return TrainingSetup(
        config=config,
        plan=plan,
        causal=causal,
        tokenizer=tokenizer,
        source=source,
        splits=splits,
        sampler=sampler,
        optimizer=make_optimizer(parameters, config.training, config.lora.loraplus_lr_ratio),
        parameters=parameters,
        store=CheckpointStore(
            RunFolder(output_dir).checkpoints,
            keep=config.output.save_total_limit,
            digest=digest,
        ),
        output_dir=output_dir,
        initial=initial,
        # With these the first answers are made, after the training, as the base model's are.
        start=adapter_state(causal.model)
        if starts_from_adapter and config.training.eval_generate
        else None,
        ranks=ranks,
        with_smaller_plans=smaller,
    )


def _load(
    config: Config,
    backend: Backend,
    parallelism: Parallelism,
    source: load.ModelSource,
    splits: DataSplits,
    output_dir: Path,
    ranks: Ranks,
) -> tuple[CausalLM, ModelSize, Initial | None]:
    """Load the base model, put the adapter on it, and share its layers out, if that is planned."""
    sharder = None
    if parallelism in ("fsdp", "deepspeed"):
        zero.check(config) if parallelism == "deepspeed" else quantize.check_sharding(config)
        is_packed = quantize.is_quantized(config.model)
        sharder = choose_sharder(
            parallelism, config.training, backend.device, ranks, is_packed=is_packed
        )
    # Where the base does not fit on a device, a copy for each rank may not fit in memory; but
    # DeepSpeed has all ranks compare theirs, one weight after the other.
    with ranks.in_turn() if parallelism == "fsdp" else contextlib.nullcontext():
        base = load.load_model(
            source,
            config.model,
            dtype=backend.dtype,
            # It goes to the device layer by layer, while these are shared out.
            device=backend.device_name if sharder is None else "cpu",
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
            initial = Initial(
                RunFolder(output_dir).initial_adapter, weights_digest(trainable_parameters(model))
            )
        causal = CausalLM(
            model,
            device=backend.device_name,
            padding_free=config.training.padding_free is not False,
            chunk=loss_chunk(config.training, sizes.vocabulary(base.config), backend.device),
            precision=backend.precision,
            kernel=backend.kernel,
        )
        base_size = model_size_of(base, parameters, trainable_parameters(model))
        if sharder is not None:
            causal.shard(sharder)
    return causal, base_size, initial


def _prove(
    config: Config,
    backend: Backend,
    parallelism: Parallelism,
    causal: CausalLM,
    base_size: ModelSize,
    ranks: Ranks,
) -> tuple[Backend, list[str]]:
    """Compare the fast ways with the model's own; return those in use, and reasons for the plan.

    Raises:
        ConfigError: flash-attn is required, and computes something else.
    """
    named = zero.names_what_it_cannot if parallelism == "deepspeed" else contextlib.nullcontext
    with named():
        fallback = probe.verify(causal, ranks.is_any)
        varying = ""
        if backend.machine.has_gpu:
            varying = determinism.require(lambda: probe.exercise(causal))
    if backend.kernel is not None and (causal.packed is None or causal.packed.kernel is None):
        if config.model.use_flash_attention == flash.STRICT:
            raise flash.refusal(fallback)
        backend = backend.without_kernel()
    reached = reach.notes(causal.model, base_size.parameters, config.lora)
    return backend, [fallback, varying, *reached]
