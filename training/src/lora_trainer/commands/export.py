"""Export the adapter of a checkpoint in PEFT's format: `lora-trainer export`.

For a run that is not finished, or a step that is not the last one. A finished run's
folder gives a copy of its final adapter.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..checkpoint_folder import CorruptCheckpointError, listed, read_state, step_of, verify
from ..data.prompt_format import format_of_run
from ..errors import Problem, UnavailableError
from ..faults import disk_fault
from ..host.disk import write_checksums
from ..redaction import Redaction
from ..remote.copies import copy_of_run
from ..run.events import Evaluated, StepDone
from ..run.recording import read_events
from ..run_folder import RunFolder
from .base_copy import base_files, copy_base
from .finetuned import (
    ADAPTER_CONFIG,
    FinetunedModel,
    config_of_run,
    find,
    is_checkpoint,
    locate_base,
    refuse_changed,
)
from .new_folder import atomic_directory, refuse_existing, refuse_full_disk

if TYPE_CHECKING:
    from ..model.load import ModelSource
    from ..report.model_card import CardFacts


@dataclass(frozen=True, slots=True)
class TakenCheckpoint:
    """A checkpoint that verified: its adapter's weights by name, and the step they are of."""

    run: Path
    step: int
    adapter: dict[str, Any]
    seconds: float
    initial: str  # the digest of the adapter that its run began with


def export_adapter(named: str, target: Path, *, has_base: bool = False) -> None:
    """Write the adapter of a checkpoint, or of a run's newest sound one, to `target`.

    With `has_base`, its base model goes into a folder in there.

    Raises:
        UnavailableError: there is none, or it does not verify.
        ConfigError, StorageError: the target already exists, or has no room.
    """
    refuse_existing(target)
    beside = ", with its base model" if has_base else ""
    named = copy_of_run(named)
    path = Path(named).expanduser().absolute()
    final = RunFolder(path).final_model
    if (final / ADAPTER_CONFIG).is_file():
        refuse_changed(final)
        _copy(final, target, _base(find(named)) if has_base else [])
        typer.echo(f"the run is finished: its final adapter was copied to {target}{beside}")
        return
    checkpoint = load_newest_checkpoint(path, named)
    config = config_of_run(checkpoint.run)
    finetuned = FinetunedModel(checkpoint.run.name, config, run=checkpoint.run)
    base = _base(finetuned) if has_base else []
    adapter_bytes = sum(weights.nbytes for weights in checkpoint.adapter.values())
    refuse_full_disk(target, adapter_bytes + _bytes_of(base))
    _write(checkpoint, finetuned, target, base)
    typer.echo(f"the adapter of step {checkpoint.step} was written to {target}{beside}")


def _base(finetuned: FinetunedModel) -> list[Path]:
    return base_files(locate_base(finetuned), finetuned.config.model)


def _bytes_of(files: list[Path]) -> int:
    return sum(one.stat().st_size for one in files)


def _copy(final: Path, target: Path, base: list[Path]) -> None:
    files = [one for one in final.iterdir() if one.is_file()]
    refuse_full_disk(target, _bytes_of([*files, *base]))
    with atomic_directory(target) as folder:
        for one in files:
            shutil.copy2(one, folder / one.name)
        if base:
            copy_base(base, folder)


def load_newest_checkpoint(path: Path, named: str) -> TakenCheckpoint:
    """Read the checkpoint at `path`, or the newest sound one of the run there."""
    candidates = [path] if is_checkpoint(path) else reversed(_listed(RunFolder(path).checkpoints))
    unsound = []
    for one in candidates:
        try:
            checkpoint = _read(one)
        except CorruptCheckpointError as error:
            unsound.append(Problem("this checkpoint is damaged", str(one), str(error)))
            continue
        for problem in unsound:
            typer.echo(f"warning: {problem.what}: {problem.where}: {problem.why}", err=True)
        return checkpoint
    if unsound:
        raise UnavailableError(unsound)
    raise UnavailableError.of(
        "there is no checkpoint" if path.exists() else "there is no such folder",
        where=named,
        why=f"a run's folder contains {RunFolder.checkpoints}/step-000100/ and so on",
        remedy=f"ls {path if path.is_dir() else path.parent}",
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return listed(folder)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise disk_fault(error) or error from error


def _read(checkpoint: Path) -> TakenCheckpoint:
    """Read a checkpoint that verifies; one that has a step for its name must be of that step.

    Raises:
        CorruptCheckpointError: it does not verify.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..train.checkpoint import state_from

    verify(checkpoint)
    raw = read_state(checkpoint)
    state = state_from(raw["state"])
    if step_of(checkpoint.name) not in (None, state.step):
        raise CorruptCheckpointError(f"it contains the checkpoint of step {state.step}")
    try:
        weights = load_file(checkpoint / "adapter.safetensors")
    except SafetensorError as error:
        raise CorruptCheckpointError("unreadable: SafetensorError") from error
    initial = str(raw.get("initial", ""))
    return TakenCheckpoint(
        checkpoint.parent.parent, state.step, weights, state.train_seconds, initial
    )


def _write(
    checkpoint: TakenCheckpoint, finetuned: FinetunedModel, target: Path, base: list[Path]
) -> None:
    """Have PEFT write the weights in its format, under its names."""
    from ..model import load
    from ..model.adapter import changes_base
    from ..report.model_card import write_model_card
    from ..train.export import save_adapter, save_prompt_format, with_prompt_format
    from ..train.initial import verified

    config = finetuned.config
    source = locate_base(finetuned)
    tokenizer = load.load_tokenizer(source, config.model)
    load.use_template(tokenizer, config.data.chat_template)
    model = _model_of(checkpoint, finetuned, source)
    if source.hub_id:
        model.peft_config["default"].base_model_name_or_path = source.hub_id
    initial = None
    if changes_base(config.lora):
        initial = verified(RunFolder(checkpoint.run).initial_adapter, checkpoint.initial)
    prompt_format = format_of_run(checkpoint.run, tokenizer)
    generation = load.load_generation_config(source, config.model)
    with atomic_directory(target) as folder:
        save_adapter(model, folder, initial, checkpoint.adapter if initial is None else None)
        facts = _card_facts(checkpoint, finetuned, source)
        stops = prompt_format.stops(tokenizer, generation)
        facts = with_prompt_format(facts, prompt_format, tokenizer, stops)
        save_prompt_format(folder, prompt_format, tokenizer, generation)
        write_model_card(folder / "README.md", Redaction.of(os.environ).event(facts))
        write_checksums(folder)
        if base:
            copy_base(base, folder)


def _model_of(checkpoint: TakenCheckpoint, finetuned: FinetunedModel, source: ModelSource) -> Any:
    """Return the model that the adapter belongs to.

    Its weights are only needed to convert an adapter that changed them; else it is built
    on the meta device, so that a base of any size takes no memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..model import (
        compat,  # noqa: F401  quiets what users can do nothing about
        load,
    )
    from ..model.adapter import add_adapter, changes_base, load_adapter_state

    section, seed = finetuned.config.model, finetuned.config.training.seed
    # The checkpoint has the weights: nothing need be decomposed to begin with.
    lora = finetuned.config.lora.model_copy(update={"init_lora_weights": True})
    if changes_base(finetuned.config.lora):
        base = load.load_model(
            source, section, dtype=torch.float32, device="cpu", attention="eager"
        )
        model = add_adapter(base, lora, seed=seed)
        load_adapter_state(model, checkpoint.adapter)
        return model
    model_config = load.load_config(source, section)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=section.trust_remote_code
        )
        base.requires_grad_(False)
        model = add_adapter(base, lora, seed=seed)
    model.peft_config["default"].base_model_name_or_path = source.path
    return model


def _card_facts(
    checkpoint: TakenCheckpoint, finetuned: FinetunedModel, source: ModelSource
) -> CardFacts:
    from ..model.load import find_license
    from ..report.model_card import CardFacts, shown_keys

    config = finetuned.config
    return CardFacts(
        run_name=f"{finetuned.name}, step {checkpoint.step}",
        base_model=source.name,
        base_model_hub_id=source.hub_id or None,
        base_model_revision=source.revision,
        base_model_license=find_license(source) or None,
        steps=checkpoint.step,
        train_seconds=checkpoint.seconds,
        trainable_parameters=sum(weights.numel() for weights in checkpoint.adapter.values()),
        config_digest=config.digest(),
        hyperparameters=shown_keys(config),
        metrics_after=_figures_at(checkpoint),
        use_dora=config.lora.use_dora,
        modules_to_save=tuple(config.lora.modules_to_save),
        target_parameters=tuple(config.lora.lora_target_parameters),
        notes=("Exported from a checkpoint; the run may have continued since.",),
    )


def _figures_at(checkpoint: TakenCheckpoint) -> dict[str, float]:
    """Return what the run's events say of this step."""
    figures: dict[str, float] = {}
    for event in read_events(RunFolder(checkpoint.run).events):
        if isinstance(event, StepDone) and event.step == checkpoint.step:
            figures["train_loss"] = event.loss
        elif isinstance(event, Evaluated) and event.step == checkpoint.step:
            names = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
            figures |= {name: getattr(event, name) for name in names}
    return figures
