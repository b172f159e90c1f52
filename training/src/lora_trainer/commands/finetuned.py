"""Find a trained adapter by folder, and load it on its base model.

`find` needs no torch: what is wrong with the folder is reported at once. `open_model` then
loads base model, tokenizer and adapter as training had them.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..checkpoint_folder import has_any
from ..config.schema import EMBEDDED_MODEL, Config, ModelSection
from ..config.sections import leaf_sections
from ..config.start_adapter import EMBEDDED_HUB_ID
from ..data.prompt_format import PromptFormat, read_format
from ..errors import ConfigError, Problem, TrainerError, UnavailableError
from ..host.disk import CHECKSUMS, is_changed
from ..memory_estimate import loss_chunk
from ..remote.copies import copy_of_run
from ..run_folder import RunFolder
from .base_copy import FOLDER as BASE_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..model.backend import Backend
    from ..model.forward import CausalLM
    from ..model.load import ModelSource

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What the embedded model's adapters name as their base, so that others find it on the hub.


@dataclass(frozen=True, slots=True)
class FinetunedModel:
    """An adapter in PEFT's format and what is known of its run; no adapter: a base model alone."""

    name: str
    config: Config
    adapter: Path | None = None
    run: Path | None = None

    def as_loaded(self, **model_keys: Any) -> FinetunedModel:
        """Return it with other keys of the model section, such as use_4bit=False."""
        section = self.config.model.model_copy(update=model_keys)
        return replace(self, config=self.config.model_copy(update={"model": section}))


def find(named: str, **model_keys: str | None) -> FinetunedModel:
    """Find what a user names: a run's folder, an adapter's, a model's, or a base model by id.

    `model_keys` are keys of the model section to use instead of the run's, where not None:
    model_name_or_path is another base model than the adapter names.

    Raises:
        UnavailableError: nothing of the kind is there.
        ConfigError: the run has no final adapter yet.
    """
    named = copy_of_run(named)
    path = Path(named).expanduser().absolute()
    other: dict[str, Any] = {key: v for key, v in model_keys.items() if v is not None}
    if "model_name_or_path" in other:
        other["model_revision"] = None
    if (path / ADAPTER_CONFIG).is_file():
        run = path.parent if RunFolder(path.parent).resolved.is_file() else None
        return _adapter(path, run).as_loaded(**other)
    if (RunFolder(path).final_model / ADAPTER_CONFIG).is_file():
        return _adapter(RunFolder(path).final_model, path).as_loaded(**other)
    if is_checkpoint(path) or has_any(RunFolder(path).checkpoints):
        raise ConfigError.of(
            "this run has no final adapter yet",
            where=named,
            why="it has checkpoints, from which training resumes, but no final_model",
            remedy=f"lora-trainer export {named} TARGET, then use TARGET",
        )
    if (path / "config.json").is_file() or (not path.exists() and _reads_like_model(named)):
        base = str(path) if path.exists() else named
        return FinetunedModel(named, Config()).as_loaded(**(other | {"model_name_or_path": base}))
    raise _nothing_there(named, path)


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is one of a run's checkpoints."""
    return (path / "manifest.json").is_file() and (path / "state.json").is_file()


def config_of_run(run: Path) -> Config:
    """Return the configuration that a run recorded; secrets are not in it.

    Raises:
        UnavailableError: the record cannot be read.
    """
    try:
        recorded = json.loads(RunFolder(run).resolved.read_text(encoding="utf-8"))
        known = leaf_sections()
        values = {
            section: {
                leaf: cell["value"]
                for leaf, cell in leaves.items()
                if known.get(leaf) == section and cell["value"] != "***"
            }
            for section, leaves in recorded.items()
        }
        return Config.model_validate(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError.of(
            "the run's recorded configuration cannot be read",
            where=str(RunFolder(run).resolved),
            why=f"{type(error).__name__}: it is missing, damaged, or of another version",
            remedy="use the adapter's folder, with --model BASE_MODEL",
        ) from error


def _adapter(folder: Path, run: Path | None) -> FinetunedModel:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UnavailableError.of(
            "the adapter has no safetensors weights",
            where=str(folder),
            why=f"{ADAPTER_WEIGHTS} is missing; pickled weights can run code and are not loaded",
            remedy="save it again with model.save_pretrained(folder, safe_serialization=True)",
        )
    refuse_changed(folder)
    if run is not None:
        return FinetunedModel(run.name, config_of_run(run), folder, run)
    base, revision = _base_of(folder)
    known = {"model_name_or_path": base, "model_revision": revision}
    return FinetunedModel(folder.name, Config(), folder).as_loaded(**known)


def refuse_changed(folder: Path) -> None:
    """Refuse an exported adapter whose weights are not those that were exported.

    Raises:
        UnavailableError: they are not.
    """
    if is_changed(folder / ADAPTER_WEIGHTS):
        raise UnavailableError.of(
            "the adapter has changed since it was exported",
            where=str(folder / ADAPTER_WEIGHTS),
            why=f"its hash does not match {CHECKSUMS}: damaged or replaced",
            remedy="export it again from a checkpoint: lora-trainer export RUN/checkpoints/STEP "
            f"TARGET; if you replaced it yourself: rm {folder / CHECKSUMS}",
        )


def _base_of(folder: Path) -> tuple[str, str | None]:
    """Return the base model, and its revision, that an adapter names or has beside it."""
    if (folder / BASE_FOLDER / "config.json").is_file():
        return str(folder / BASE_FOLDER), None
    try:
        facts = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = str(facts["base_model_name_or_path"]), facts.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError.of(
            "the adapter's configuration cannot be read",
            where=str(folder / ADAPTER_CONFIG),
            why=type(error).__name__,
            remedy="export it again: lora-trainer export RUN TARGET",
        ) from error
    return (EMBEDDED_MODEL, None) if base == EMBEDDED_HUB_ID else (base, revision)


def _reads_like_model(named: str) -> bool:
    from ..model.load import looks_like_path

    return named == EMBEDDED_MODEL or (named.count("/") == 1 and not looks_like_path(named))


def _nothing_there(named: str, path: Path) -> TrainerError:
    near = path if path.is_dir() else path.parent
    runs = sorted(
        str(one.parent.parent) for one in near.glob(f"*/{RunFolder.final_model}/{ADAPTER_CONFIG}")
    )
    return UnavailableError.of(
        "there is no trained adapter" if path.exists() else "there is no such folder",
        where=named,
        why=f"a run's folder contains {RunFolder.final_model}/, an adapter's folder "
        f"contains {ADAPTER_CONFIG}",
        remedy=f"did you mean {' or '.join(runs[:3])} ?" if runs else f"ls {near}",
    )


@dataclass
class LoadedModel:
    """A model ready to be asked: `causal` for figures and answers, `source` to speak of it."""

    causal: CausalLM
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    finetuned: FinetunedModel
    prompt_format: PromptFormat

    @property
    def stops(self) -> list[int]:
        """Return the ids of the tokens that end an answer."""
        return self.prompt_format.stops(self.tokenizer, self.causal.inner.generation_config)

    @property
    def has_adapter(self) -> bool:
        """Return whether an adapter stands on the base model."""
        return self.finetuned.adapter is not None


def open_model(finetuned: FinetunedModel, *, is_exact: bool = False) -> LoadedModel:
    """Load base model and adapter as training does here; or exactly: in float32, on the CPU.

    Raises:
        UnavailableError, AccessError, ConfigError: the base cannot be had, or does not fit.
    """
    from ..machine import read_machine
    from ..model import load, probe, quantize
    from ..model.backend import EXACT, resolve, usable_machine, without_gpus
    from ..model.precision import without_float16
    from ..run.memory_limits import release

    machine = without_gpus(read_machine()) if is_exact else usable_machine(read_machine())
    config, whole = quantize.as_possible(finetuned.config, has_gpu=machine.has_gpu)
    section = config.model
    if whole:
        typer.echo(f"warning: {whole}", err=True)
    source = locate_base(finetuned)
    tokenizer = load.load_tokenizer(tokenizer_source(finetuned, source), section)
    base_config = load.load_config(source, section)
    backend = resolve(EXACT if is_exact else section, machine, base_config)
    causal = _on(backend, finetuned, source, section)
    if probe.overflows_float16(causal):
        del causal
        release()
        backend = resolve(without_float16(section), machine, base_config)
        causal = _on(backend, finetuned, source, section)
    prompt_format = read_format(finetuned.adapter, tokenizer)
    return LoadedModel(causal, backend, tokenizer, source, finetuned, prompt_format)


def _on(
    backend: Backend, finetuned: FinetunedModel, source: ModelSource, section: ModelSection
) -> CausalLM:
    """Load base model and adapter to compute as `backend` says."""
    from ..model import load, sizes
    from ..model.forward import CausalLM

    model = load.load_model(
        source,
        section,
        dtype=backend.dtype,
        device=backend.device_name,
        attention=backend.attention,
    )
    if finetuned.adapter is not None:
        model = _with_adapter(model, finetuned)
    return CausalLM(
        model.eval(),
        device=backend.device_name,
        padding_free=False,
        chunk=loss_chunk(finetuned.config.training, sizes.vocabulary(model.config), backend.device),
        precision=backend.precision,
    )


def locate_base(finetuned: FinetunedModel) -> ModelSource:
    """Find the base model, as `load.locate`; the remedy names the flag that names another one."""
    from ..model import load

    try:
        return load.locate(finetuned.config.model)
    except UnavailableError as error:
        other = "if it has moved: --model FOLDER_OR_HUB_ID"
        problems = [replace(p, remedy=f"{p.remedy}; {other}") for p in error.problems]
        raise UnavailableError(problems if finetuned.adapter else error.problems) from error


def tokenizer_source(finetuned: FinetunedModel, source: ModelSource) -> Any:
    """Return where the tokenizer is: beside the adapter, with the template of its training."""
    folder = finetuned.adapter
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return source
    return replace(source, path=str(folder))


def _with_adapter(base: Any, finetuned: FinetunedModel) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT's advice on tied layers and old versions is for whoever trains.
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(base, str(finetuned.adapter))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            Problem(
                "the adapter does not fit this base model",
                str(finetuned.adapter),
                str(error).strip().splitlines()[0][:300],
                f"use the model that it was trained on: --model (it names "
                f"{_base_of(finetuned.adapter)[0] if finetuned.adapter else ''})",
            )
        ) from error
