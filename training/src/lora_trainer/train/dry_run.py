"""Plan a run, including its parallelism, before any weight is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..batch import NOT_BEGUN, RunBatch
from ..config.schema import Config
from ..config.start_adapter import find_adapter
from ..data.prepare import DataSplits
from ..machine import read_machine
from ..memory_estimate import ModelSize, Parallelism
from ..model import (
    compat,  # noqa: F401  it quiets libraries before they are imported
    load,
    probe,
    quantize,
    reach,
    sizes,
)
from ..model.adapter import add_adapter, read_start, trainable_parameters
from ..model.backend import Backend, resolve, usable_machine
from ..model.footprint import Footprint
from ..model.ranks import Ranks
from ..plan import Plan, choose_parallelism, make_plan, process_count
from .datasets import profile_of, refuse_long_rows, rows_of_epoch_in, rows_to_train, source_specs

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def parallelism_before_loading(
    config: Config, backend: Backend, model_config: PretrainedConfig, ranks: Ranks
) -> tuple[Parallelism, str]:
    """Return how ranks share the work, and why: where weights are loaded to depends on it."""
    if ranks.count == 1 and config.training.parallelism != "deepspeed":
        return "none", ""
    base = _unloaded(config, model_config)
    sized = model_size_of(base, quantize.count_parameters(base), {})
    return choose_parallelism(config, backend.machine, sized, backend.precision, ranks.count)


def _unloaded(config: Config, model_config: PretrainedConfig) -> Any:
    """Return the base model without its weights, on the meta device.

    Raises:
        ConfigError: it is none that transformers builds.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                model_config, trust_remote_code=config.model.trust_remote_code
            )
    except Exception as error:  # each class checks its configuration in its own way
        why = f"transformers cannot build it as a causal language model: {probe.first_line(error)}"
        raise probe.refusal(model_config, why) from error


def refuse_unsupported(config: Config, model_config: PretrainedConfig) -> None:
    """Refuse a model that cannot be trained on text, before its weights are read.

    Raises:
        ConfigError: it is no causal language model, asks for something else than tokens, or
            has experts that cannot be quantized as asked.
    """
    base = _unloaded(config, model_config)
    quantize.refuse_fused_experts(config.model, base)
    probe.check_unloaded(base)


def preview(
    config: Config, source: load.ModelSource, splits: DataSplits, *, begun: RunBatch = NOT_BEGUN
) -> Plan:
    """Return the plan without loading weights: the model is built on the meta device.

    `begun` is the batch of the run that a start would continue.

    Raises:
        ConfigError, DataError: what training would refuse of adapter and lengths.
    """
    listed = read_machine()
    processes = process_count(config, listed)
    machine = usable_machine(listed, processes)
    model_config = load.load_config(source, config.model)
    config, whole = quantize.apply_stored_quantization(
        config, model_config, has_gpu=machine.has_gpu
    )
    base = _unloaded(config, model_config)
    quantize.refuse_fused_experts(config.model, base)
    probe.check_unloaded(base)
    backend = resolve(config.model, machine, model_config)
    with torch.device("meta"):
        base.requires_grad_(False)
        refuse_long_rows(config, base, splits)
        parameters = quantize.count_parameters(base)
        # PiSSA and OLoRA decompose weights, which are not there.
        lora = config.lora.model_copy(update={"init_lora_weights": True})
        model = add_adapter(base, lora, seed=config.training.seed)
        trainable = trainable_parameters(model)
        reached = reach.notes(model, parameters[0], config.lora)
    if config.lora.adapter_name_or_path is not None:
        read_start(model, find_adapter(config.lora.adapter_name_or_path))
    weights = [source.weight for source in source_specs(config, config.data.dataset)]
    sized = model_size_of(base, parameters, trainable)
    parallelism, why = choose_parallelism(config, machine, sized, backend.precision, processes)
    is_packed = config.training.padding_free is not False
    footprint = footprint_of(config, backend, model_config, is_packed=is_packed)
    plan = make_plan(
        config,
        backend.machine,
        sized,
        profile_of(splits, rows_to_train(rows_of_epoch_in(splits, weights, config.training.seed))),
        precision=backend.precision,
        attention=backend.packed if is_packed else backend.attention,
        padding_free=is_packed,
        processes=processes,
        parallelism=parallelism,
        begun=begun,
        reasons=tuple(filter(None, (whole, *backend.reasons, why, *reached))),
        count=footprint,
    )
    return replace(plan, reasons=(*plan.reasons, *footprint.faults))


def footprint_of(
    config: Config,
    backend: Backend,
    base_config: PretrainedConfig,
    *,
    is_packed: bool,
    kinds_apart: frozenset[str] = frozenset(),
) -> Footprint:
    """Return what counts the memory of the plan's steps."""
    return Footprint(
        config,
        base_config,
        partial(_unloaded, config),
        device=backend.device,
        precision=backend.precision,
        attention=backend.attention,
        padding_free=is_packed,
        kernel=backend.kernel,
        kinds_apart=kinds_apart,
    )


def model_size_of(
    model: Any, parameters: tuple[int, int], trainable: dict[str, torch.nn.Parameter]
) -> ModelSize:
    """Return what the plan needs to know of a model: all its parameters, and those trained."""
    config = model.config
    return ModelSize(
        model_type=config.model_type,
        layers=sizes.layers(config) or 1,
        hidden_size=sizes.width(config),
        vocab_size=sizes.vocabulary(config),
        parameters=parameters[0],
        unquantized_parameters=parameters[1],
        trainable_parameters=sum(p.numel() for p in trainable.values()),
        max_positions=sizes.positions(config),
    )
