"""Find and load the base model and its tokenizer: embedded, local, or from the hub.

Only safetensors are read; code of a model repository runs only when asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import named_templates
from ..config.schema import EMBEDDED_MODEL, DataSection, ModelSection
from ..errors import TrainerError, UnavailableError
from ..host.addresses import default_cache
from . import embedded, hub, quantize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the base model is: `path` to load it from, `name` and `license` to speak of it.

    `hub_id` is empty for a model that the hub does not know. `is_cached` says that the
    hub is out of reach and its local cache is used without asking.
    """

    path: str
    name: str
    license: str = ""
    revision: str | None = None
    hub_id: str = ""
    note: str = ""
    is_cached: bool = False

    @property
    def is_local(self) -> bool:
        """Return whether nothing need be downloaded."""
        return Path(self.path).is_dir()

    def refusal(self, error: BaseException) -> TrainerError:
        """Return what an error of transformers or of the hub means for this model."""
        return hub.explained(error, self.path, self.revision, is_local=self.is_local)


def cache_of(section: ModelSection) -> Path:
    """Return the folder that prepared models are kept in."""
    return Path(section.model_cache_dir) if section.model_cache_dir else default_cache()


def dataset_cache_of(section: DataSection) -> Path:
    """Return the folder that tokenized rows are kept in."""
    return Path(section.dataset_cache_dir or default_cache() / "datasets")


def locate(section: ModelSection) -> ModelSource:
    """Find the base model; prepare the embedded one, ask the hub for one that is there.

    Raises:
        UnavailableError: it is not there, or holds no safetensors.
        AccessError: the hub rejected the token.
    """
    name = section.model_name_or_path
    if name == EMBEDDED_MODEL:
        return _local_source(embedded.prepare(cache_of(section)), EMBEDDED_MODEL)
    if Path(name).is_dir():
        for problem in local_problems(Path(name)):
            raise problem
        return _local_source(Path(name), name)
    if looks_like_path(name):
        raise UnavailableError.of(
            "the base model's folder does not exist",
            where=f"model_name_or_path: {name}",
            why="it is a file" if Path(name).is_file() else "nothing exists at that path",
            remedy=f"ls {Path(name).parent}",
        )
    return _hub_source(section)


def looks_like_path(name: str) -> bool:
    """Return whether a name is a path and not a hub id such as owner/name."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")


def local_problems(folder: Path) -> list[TrainerError]:
    """Return what hinders loading a local model folder: files that are missing or unsafe."""
    files = sorted(path.name for path in folder.iterdir())
    if "config.json" not in files:
        return [
            UnavailableError.of(
                "the folder does not contain a model",
                where=f"model_name_or_path: {folder}",
                why="it has no config.json",
                remedy=f"ls {folder}",
            )
        ]
    return _unsafe_weights(
        str(folder),
        files,
        "save it again with model.save_pretrained(folder) under a trusted environment",
    ) or _stray_pickles(folder, files)


def _stray_pickles(folder: Path, files: list[str]) -> list[TrainerError]:
    """Refuse pickled files beside sound weights: nobody needs them, and any tool may open them."""
    pickled = [file for file in files if file.endswith(PICKLES)]
    if not pickled:
        return []
    return [
        UnavailableError.of(
            "the base model's folder contains pickled files",
            where=f"model_name_or_path: {folder}",
            why=f"{', '.join(pickled[:3])} can run code when loaded; they were not opened",
            remedy=f"mkdir {folder}.pickled && "
            f"mv {' '.join(str(folder / file) for file in pickled)} {folder}.pickled",
        )
    ]


def _unsafe_weights(name: str, files: list[str], remedy: str) -> list[TrainerError]:
    if any(file in WEIGHTS for file in files):
        return []
    unsafe = [file for file in files if file.endswith(PICKLES)]
    why = (
        f"its weights are pickled ({', '.join(unsafe[:3])}), which can run code when loaded"
        if unsafe
        else f"it has neither {' nor '.join(WEIGHTS)}"
    )
    return [
        UnavailableError.of(
            "the base model has no safetensors weights",
            where=f"model_name_or_path: {name}",
            why=why,
            remedy=remedy,
        )
    ]


def _hub_source(section: ModelSection) -> ModelSource:
    """Ask the hub what a model repository holds, before anything is downloaded.

    transformers, finding pickled weights only, would send the token to a conversion service.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    name, revision = section.model_name_or_path, section.model_revision
    source = ModelSource(name, name, revision=revision, hub_id=name)
    try:
        info = HfApi().model_info(
            name, revision=revision, timeout=HUB_SECONDS, token=section.hf_token
        )
    except Exception as error:
        if hub.is_offline(error):
            return source
        if not hub.is_unreachable(error):
            raise source.refusal(error) from error
        cached = try_to_load_from_cache(
            name, "config.json", cache_dir=section.model_cache_dir, revision=revision
        )
        if not isinstance(cached, str):
            raise source.refusal(error) from error
        # Each file would else be asked for with five retries, 23 seconds long.
        return replace(source, is_cached=True)
    remedy = (
        f"use a model with {WEIGHTS[0]}; https://huggingface.co/spaces/safetensors/convert can "
        "add it"
    )
    for problem in _unsafe_weights(name, [file.rfilename for file in info.siblings or ()], remedy):
        raise problem
    return source


def load_tokenizer(source: ModelSource, section: ModelSection) -> Any:
    """Load the tokenizer; one without a pad token is given its end token for padding.

    Raises:
        UnavailableError, AccessError: it cannot be had.
    """
    from transformers import AutoTokenizer

    with _hub_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **_hub_arguments(source, section))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def use_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Have an exported tokenizer ask the model as it was trained: by a template that was given."""
    if template is not None:
        tokenizer.chat_template = template_text(template)


def template_text(template: str) -> str:
    """Return a chat template's text: itself, or that of the template or the file that it names."""
    if template in named_templates.NAMES:
        return named_templates.text_of(template)
    return template if "{" in template else Path(template).read_text(encoding="utf-8")


def load_config(source: ModelSource, section: ModelSection) -> Any:
    """Load the model's config alone.

    Raises:
        UnavailableError, AccessError: it cannot be had.
    """
    from transformers import AutoConfig

    with _hub_errors(source):
        return AutoConfig.from_pretrained(source.path, **_hub_arguments(source, section))


def load_generation_config(source: ModelSource, section: ModelSection) -> Any:
    """Load the generation config; a model without a file of it has what its config says.

    Raises:
        UnavailableError, AccessError: it cannot be had.
    """
    from transformers import GenerationConfig

    arguments = _hub_arguments(source, section)
    arguments.pop("trust_remote_code")
    try:
        return GenerationConfig.from_pretrained(source.path, **arguments)
    except OSError:
        return GenerationConfig.from_model_config(load_config(source, section))


def load_model(
    source: ModelSource, section: ModelSection, *, dtype: Any, device: str, attention: str
) -> Any:
    """Load the base model, frozen, onto the device: one weight after the other, read from the file.

    `device` names its number where there are several, because transformers loads in threads,
    and each thread of PyTorch starts at device 0.

    Raises:
        UnavailableError, AccessError: it cannot be had.
    """
    from transformers import AutoModelForCausalLM

    from .compat import dtype_argument, placement

    base_config = load_config(source, section)
    arguments = _hub_arguments(source, section) | dtype_argument(dtype)
    arguments |= placement(device, has_own_code=_has_own_code(base_config, section))
    is_stored = quantize.is_packed(base_config)
    is_quantized = is_stored or quantize.is_quantized(section)
    if is_quantized:
        arguments["device_map"] = {"": device}
        if not is_stored:
            arguments["quantization_config"] = quantize.quantization(section, dtype)
    with _hub_errors(source):
        model = AutoModelForCausalLM.from_pretrained(
            source.path, attn_implementation=attention, use_safetensors=True, **arguments
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    if not is_quantized:
        return model.to(device)
    quantize.refuse_fused_experts(section, model)
    quantize.prepare(model)
    return model


def _has_own_code(base_config: PretrainedConfig, section: ModelSection) -> bool:
    """Return whether a model's class comes from its own repository."""
    return section.trust_remote_code and "AutoModelForCausalLM" in (
        getattr(base_config, "auto_map", None) or {}
    )


def weights_folder(source: ModelSource, section: ModelSection) -> Path:
    """Return the folder of the weights' files, in the hub's cache once they were loaded."""
    if source.is_local:
        return Path(source.path)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.path,
            revision=source.revision,
            cache_dir=section.model_cache_dir,
            local_files_only=True,
        )
    )


def _hub_arguments(source: ModelSource, section: ModelSection) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if not source.is_local:
        arguments |= {"revision": source.revision or "main", "token": section.hf_token}
        if source.is_cached:
            arguments["local_files_only"] = True
        if section.model_cache_dir:
            arguments["cache_dir"] = section.model_cache_dir
    return arguments


def _local_source(folder: Path, name: str) -> ModelSource:
    try:
        origin = json.loads((folder / "origin.json").read_text())
        return ModelSource(
            str(folder), name, origin["license"], hub_id=origin["name"], note=origin["note"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ModelSource(str(folder), name)


def find_license(source: ModelSource) -> str:
    """Return the licence that the base model's own card names; empty where none is known."""
    from huggingface_hub import ModelCard

    if source.license:
        return source.license
    try:
        card = str(Path(source.path) / "README.md") if source.is_local else source.path
        data = ModelCard.load(card).data
        return str(getattr(data, "license_name", None) or getattr(data, "license", None) or "")
    except Exception:  # a card is a courtesy: no fault in it may hinder training
        return ""


class _hub_errors:  # noqa: N801  used as a function: `with _hub_errors(source):`
    """Turn what transformers and the hub raise into our errors."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, TrainerError | KeyboardInterrupt | MemoryError):
            return
        if not isinstance(error, OSError | ValueError | ImportError):
            return
        raise self.source.refusal(error) from error
