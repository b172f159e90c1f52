"""Find the adapter that training starts from and compare it with the configuration.

`adapter_name_or_path` names a run's folder, a checkpoint's, or one in PEFT's format. Rank, alpha,
targets and similar keys come from the adapter: unset keys are taken from it, set ones must agree.
Only safetensors are read. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint_folder import CorruptCheckpointError, listed, verify
from ..errors import ConfigError, Problem
from ..host.addresses import is_address
from ..host.disk import CHECKSUMS, is_changed
from ..host.quoting import shell_word
from ..run_folder import RunFolder
from .layers import Given
from .schema import EMBEDDED_MODEL, Config

KEY = "adapter_name_or_path"
# Keys determined by an adapter, each with PEFT's name first.
SHAPE_KEYS = (
    ("r", "lora_r"),
    ("lora_alpha", "lora_alpha"),
    ("target_modules", "lora_target_modules"),
    ("target_parameters", "lora_target_parameters"),
    ("use_rslora", "use_rslora"),
    ("use_dora", "use_dora"),
    ("modules_to_save", "modules_to_save"),
)
# PEFT features that are not supported, with the values that disable them.
UNTRAINED = {
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (),
    "layer_replication": (),
    "trainable_token_indices": ([], {}),
    "exclude_modules": ([],),
    "lora_bias": (False,),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "megatron_config": (),
    "ensure_weight_tying": (False,),
}
# PEFT's keys that change neither what an adapter computes nor which of its weights are trained.
IGNORED = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "init_lora_weights",
        "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    }
)  # fmt: skip
BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga")
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CHECKPOINT_WEIGHTS = "adapter.safetensors"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """An adapter on disk: its weights file, its keys in our spelling, and its base model.

    `run` is the folder of the run that trained it, if known.
    """

    weights: Path
    base: str
    revision: str | None = None
    run: Path | None = None
    is_checkpoint: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Return the folder of the adapter or checkpoint."""
        return self.weights.parent


def find_adapter(named: str) -> StartAdapter:
    """Find the adapter that `adapter_name_or_path` names.

    Raises:
        ConfigError: it does not exist, is pickled, or cannot be trained further.
    """
    path = Path(named)
    if is_address(named):
        raise ConfigError.of(
            "adapter_name_or_path cannot be on an object store",
            where=named,
            why="training starts from a local folder",
            remedy=f"lora-trainer fetch {shell_word(named)} FOLDER, then --adapter_name_or_path "
            "FOLDER",
        )
    if (path / CONFIG).is_file():
        run = (
            path.parent
            if path.name == RunFolder.final_model and RunFolder(path.parent).resolved.is_file()
            else None
        )
        return _in_peft_format(path, run)
    if (RunFolder(path).final_model / CONFIG).is_file():
        return _in_peft_format(RunFolder(path).final_model, path)
    if (path / CHECKPOINT_WEIGHTS).is_file():
        return _checkpoint(path)
    for checkpoint in reversed(_listed(RunFolder(path).checkpoints)):
        if _is_sound(checkpoint):
            return _checkpoint(checkpoint)
    if (path / PICKLED).is_file():
        raise _pickled(path)
    is_hub_id = not path.exists() and named.count("/") >= 1
    raise _unusable(
        path,
        "there is no adapter in it" if path.exists() else "there is no such folder",
        f"name a run's folder, a checkpoint's, or one with {CONFIG}"
        + ("; an adapter on the hub: hf download OWNER/NAME --local-dir FOLDER" * is_hub_id),
    )


def adopt(config: Config, given: Mapping[str, Given]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the leaves determined by the adapter, and the set ones that disagree with it."""
    assert config.lora.adapter_name_or_path is not None
    try:
        adapter = find_adapter(config.lora.adapter_name_or_path)
    except ConfigError as error:
        return {}, list(error.problems)
    values = {leaf: v for leaf, v in adapter.values.items() if leaf not in given}
    now = config.lora.model_dump()
    problems = [
        _disagreement(leaf, now[leaf], theirs, given[leaf], adapter)
        for leaf, theirs in adapter.values.items()
        if leaf in given and not _agrees(leaf, now[leaf], theirs)
    ]
    base = config.model.model_name_or_path
    if "model_name_or_path" not in given:
        values |= {"model_name_or_path": adapter.base, "model_revision": adapter.revision}
    elif _plain(base) != adapter.base and not any(Path(p).is_dir() for p in (base, adapter.base)):
        # Folders are compared by content, once the model is loaded.
        problems.append(
            _disagreement(
                "model_name_or_path", base, adapter.base, given["model_name_or_path"], adapter
            )
        )
    return values, problems


def _plain(base: str) -> str:
    """Return the name of a base model; the embedded model's hub id maps to the embedded name."""
    return EMBEDDED_MODEL if base == EMBEDDED_HUB_ID else base


def _in_peft_format(folder: Path, run: Path | None) -> StartAdapter:
    if not (folder / WEIGHTS).is_file():
        raise (
            _pickled(folder)
            if (folder / PICKLED).is_file()
            else _unusable(
                folder, f"it has no {WEIGHTS}", "save it again with model.save_pretrained(folder)"
            )
        )
    if is_changed(folder / WEIGHTS):
        raise _unusable(
            folder,
            f"{WEIGHTS} does not match {CHECKSUMS}: damaged or replaced",
            f"use a checkpoint of its run; if you replaced it yourself: rm {folder / CHECKSUMS}",
        )
    facts = _read(folder / CONFIG)
    if facts.get("peft_type") != "LORA":
        raise _unusable(
            folder, f"it is not a LoRA adapter ({facts.get('peft_type')})", "use another"
        )
    extra = [key for key, off in UNTRAINED.items() if facts.get(key) not in (None, *off)]
    if extra:
        raise _unusable(
            folder,
            f"its {CONFIG} sets {', '.join(f'{key}: {facts[key]!r}' for key in extra)}, which is "
            "not supported",
            "merge that adapter into its base with PEFT, and train on the merged model",
        )
    _refuse_changed_base(folder, facts.get("init_lora_weights"), "export it with PEFT's conversion")
    values = {ours: facts.get(theirs) for theirs, ours in SHAPE_KEYS}
    base = str(facts.get("base_model_name_or_path") or "")
    return _checked(
        StartAdapter(
            folder / WEIGHTS,
            _plain(base),
            facts.get("revision"),
            run,
            values=values,
        )
    )


def _checkpoint(folder: Path) -> StartAdapter:
    run = folder.parent.parent
    if not _is_sound(folder):
        raise _unusable(folder, "the checkpoint is damaged or not complete", f"ls {folder.parent}")
    recorded = _read(RunFolder(run).resolved)
    try:
        lora = {leaf: cell["value"] for leaf, cell in recorded["lora"].items()}
        model = {leaf: cell["value"] for leaf, cell in recorded["model"].items()}
        lora.setdefault("lora_target_parameters", [])  # older runs do not have this key
        values = {leaf: lora[leaf] for _, leaf in SHAPE_KEYS}
        base, revision = str(model["model_name_or_path"]), model["model_revision"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _unusable(
            folder, f"{RunFolder(run).resolved} does not record how it was trained", f"ls {run}"
        ) from error
    _refuse_changed_base(
        folder, lora.get("init_lora_weights"), f"lora-trainer export {folder} TARGET, then TARGET"
    )
    weights = folder / CHECKPOINT_WEIGHTS
    return _checked(StartAdapter(weights, base, revision, run, is_checkpoint=True, values=values))


def _checked(adapter: StartAdapter) -> StartAdapter:
    """Reject keys of wrong types; null disables a key."""
    values = dict(adapter.values)
    for leaf in ("modules_to_save", "lora_target_parameters"):
        values[leaf] = list(values[leaf] or [])
    for leaf in ("use_rslora", "use_dora"):
        values[leaf] = bool(values[leaf])
    try:
        values["lora_alpha"] = float(values["lora_alpha"])
        type(Config().lora).model_validate(values)
    except (TypeError, ValueError) as error:
        raise _unusable(
            adapter.folder,
            f"its configuration cannot be read: {str(error).splitlines()[0]}",
            "save it again with model.save_pretrained(folder)",
        ) from error
    if not adapter.base:
        raise _unusable(
            adapter.folder,
            "it does not name a base model",
            f"set base_model_name_or_path in its {CONFIG}",
        )
    return StartAdapter(
        adapter.weights,
        adapter.base,
        adapter.revision,
        adapter.run,
        adapter.is_checkpoint,
        values,
    )


def _agrees(leaf: str, mine: Any, theirs: Any) -> bool:
    """Compare values; target modules not given as a list are compared on the loaded model."""
    if leaf == "lora_target_modules" and not (isinstance(mine, list) and isinstance(theirs, list)):
        return True
    if isinstance(mine, list) and isinstance(theirs, list):
        return set(mine) == set(theirs)
    return bool(mine == theirs)


def _disagreement(
    leaf: str, mine: object, theirs: object, given: Given, adapter: StartAdapter
) -> Problem:
    return Problem(
        f"{leaf} {mine} differs from the adapter's {theirs}",
        given.origin.location,
        f"training starts from {adapter.folder}, which has {leaf} {theirs}",
        f"remove {leaf} to take it from the adapter, or use another {KEY}",
    )


def _listed(folder: Path) -> list[Path]:
    try:
        return listed(folder)
    except (OSError, ValueError):  # ValueError: no path holds a NUL character
        return []


def _is_sound(checkpoint: Path) -> bool:
    """Return whether a checkpoint verifies."""
    try:
        verify(checkpoint)
    except CorruptCheckpointError:
        return False
    return True


def _refuse_changed_base(folder: Path, init: Any, remedy: str) -> None:
    if isinstance(init, str) and init.startswith(BASE_CHANGING):
        raise _unusable(
            folder, f"its initialization, {init}, changed the base model that it belongs to", remedy
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(
            path.parent, f"{path.name}: {type(error).__name__}", f"ls -l {path}"
        ) from error
    return content if isinstance(content, dict) else {}


def _pickled(folder: Path) -> ConfigError:
    return _unusable(
        folder,
        f"{PICKLED} is pickled, which can run code when loaded; it was not opened",
        "save it again with model.save_pretrained(folder, safe_serialization=True)",
    )


def _unusable(folder: Path, why: str, remedy: str) -> ConfigError:
    return ConfigError(
        Problem("the adapter to start from cannot be used", f"{KEY}: {folder}", why, remedy)
    )
