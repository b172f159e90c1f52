"""Put a LoRA adapter on a base model, through PEFT; read and write its weights.

PEFT's modules and state names stay as they are, so that what is saved loads with plain
`PeftModel.from_pretrained`.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from ..config.schema import LoraSection
from ..config.start_adapter import StartAdapter
from ..errors import ConfigError, TrainerError
from . import compat, reach

# These inits move part of the base weights into the adapter: the saved adapter must be
# converted to fit the untouched base model (PEFT doubles its rank for that).
BASE_CHANGING_INITS = ("pissa", "olora")
ALL_LINEAR = "all-linear"
NAMES = re.compile(r"\s*[\w.\-]+(\s*,\s*[\w.\-]+)*\s*")  # else a regular expression


def changes_base(section: LoraSection) -> bool:
    """Tell whether the init alters the base weights."""
    init = section.init_lora_weights
    return isinstance(init, str) and init.startswith(BASE_CHANGING_INITS)


def add_adapter(model: Any, section: LoraSection, *, seed: int) -> Any:
    """Return the PEFT model; the adapter's first weights depend on the seed alone.

    Raises:
        ConfigError: a target module is not in the model, or cannot be adapted so.
    """
    from peft import LoraConfig, get_peft_model

    targets = _named_targets(section.lora_target_modules)
    _refuse_unknown_modules(model, targets, section.modules_to_save)
    if changes_base(section):
        _refuse_large_rank(model, targets, section.lora_r)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.lora_r,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=section.lora_dropout,
        target_modules=targets,
        exclude_modules=_left_alone(model, targets) or None,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        # LoftQ's first weights follow (loftq.py); PEFT's own would round the base itself.
        init_lora_weights=True
        if section.init_lora_weights == "loftq"
        else section.init_lora_weights,
        modules_to_save=list(section.modules_to_save) or None,
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # PEFT gives fused experts a rank of their own, and then warns that no module has it.
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
            if targets == ALL_LINEAR:
                _leave_router_parameters(model, lora)
            return get_peft_model(model, lora)
    except (ValueError, TypeError) as error:  # PEFT's word on what it cannot adapt
        raise ConfigError.of(
            "PEFT cannot put this adapter on the model",
            where="lora_target_modules or modules_to_save",
            why=str(error).split("\n")[0],
            remedy=_linear_remedy(model),
        ) from error


def _left_alone(model: Any, targets: str | list[str]) -> list[str]:
    """Return endings of names that all-linear leaves alone: routers, what PEFT cannot adapt."""
    if targets != ALL_LINEAR:
        return []
    left = reach.routers(model) | reach.read_past_lora(model) | reach.own_products(model)
    adapted = [name for name in _targeted(model, targets) if name not in left]
    return reach.shortest(left, adapted)


def _leave_router_parameters(model: Any, lora: Any) -> None:
    """Take routers out of the parameters that PEFT makes of all-linear on transformers 5.

    It adapts tensors of fused experts too, but neither with dropout nor with DoRA.
    """
    if compat.MAJOR < 5:
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    convert_peft_config_for_transformers(lora, model, None)
    can_adapt = not lora.lora_dropout and not lora.use_dora
    kept = sorted(
        name
        for name in lora.target_parameters or ()
        if can_adapt and not reach.is_router_parameter(name)
    )
    lora.target_parameters = kept or None


def _named_targets(targets: str | list[str]) -> str | list[str]:
    """Return all-linear, a list of names, or a regular expression that compiles."""
    if not isinstance(targets, str) or targets == ALL_LINEAR:
        return targets
    if NAMES.fullmatch(targets):
        return [part.strip() for part in targets.split(",")]
    try:
        re.compile(targets)
    except re.error as error:
        raise ConfigError.of(
            "lora_target_modules is no regular expression",
            where="lora_target_modules",
            why=str(error),
            remedy="write names such as q_proj,v_proj, or an expression such as .*(q|v)_proj",
        ) from None
    return targets


def _targeted(model: Any, targets: str | list[str]) -> dict[str, Any]:
    """Return the modules, by name, that PEFT takes the targets for."""
    modules = {name: module for name, module in model.named_modules() if name}
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        return {n: m for n, m in modules.items() if _is_linear(m) and m is not head}
    if isinstance(targets, str):
        return {n: m for n, m in modules.items() if re.fullmatch(targets, n)}
    return {n: m for n, m in modules.items() if not set(targets).isdisjoint(_suffixes(n))}


def _refuse_large_rank(model: Any, targets: str | list[str], rank: int) -> None:
    """Refuse a rank beyond that of a weight that the init decomposes."""
    linear = {name: m for name, m in _targeted(model, targets).items() if _is_linear(m)}
    sides = {name: min(m.in_features, m.out_features) for name, m in linear.items()}
    smallest = min(sides, key=lambda name: sides[name], default="")
    if smallest and rank > sides[smallest]:
        raise ConfigError.of(
            f"lora_r {rank} is too large for pissa and olora on this model",
            where="lora_r",
            why=f"the largest possible rank is {sides[smallest]}, the smaller side of {smallest}",
            remedy=f"--lora_r {sides[smallest]}",
        )


def _refuse_unknown_modules(
    model: Any, targets: str | list[str], modules_to_save: list[str]
) -> None:
    if isinstance(targets, str) and targets != ALL_LINEAR and not _targeted(model, targets):
        raise ConfigError.of(
            "lora_target_modules matches no module of the model",
            where="lora_target_modules",
            why="a regular expression must match a module's whole name, such as "
            + next((n for n, m in model.named_modules() if _is_linear(m)), "layers.0.q_proj"),
            remedy=_linear_remedy(model),
        )
    names = {part for name, _ in model.named_modules() for part in _suffixes(name)}
    asked = [] if isinstance(targets, str) else list(targets)
    unknown = [name for name in (*asked, *modules_to_save) if name not in names]
    if unknown:
        raise ConfigError.of(
            f"the model has no module named {', '.join(unknown)}",
            where="lora_target_modules or modules_to_save",
            why=f"its linear modules are {_linear_names(model)}",
            remedy="name some of these, or use all-linear",
        )


def _linear_remedy(model: Any) -> str:
    return f"name some of {_linear_names(model)}, or use all-linear"


def _linear_names(model: Any) -> str:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)}
    return ", ".join(sorted(linear - {"base_layer", "default"}))


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return copies of the trained parameters on the CPU, by their names in the model."""
    return {
        name: p.detach().to("cpu", copy=True).contiguous()
        for name, p in trainable_parameters(model).items()
    }


@torch.no_grad()
def load_adapter_state(model: Any, state: dict[str, Tensor]) -> None:
    """Put saved trained parameters back, in place.

    Raises:
        ValueError: names or shapes are not those of this model.
    """
    parameters = trainable_parameters(model)
    if parameters.keys() != state.keys():
        raise ValueError(f"{len(parameters.keys() ^ state.keys())} parameters differ by name")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(f"{name}: shape {tuple(state[name].shape)}")
        parameter.copy_(state[name])


def read_start(model: Any, start: StartAdapter) -> dict[str, Tensor]:
    """Read the weights of the adapter that training starts from; they fit the model's own.

    Raises:
        ConfigError: names or shapes are not those of the adapted modules.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(start.weights)
    own: dict[str, Tensor] = dict(trainable_parameters(model))
    if not start.is_checkpoint:
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        # PEFT may keep frozen embeddings in an adapter's file, too.
        weights = {name: value for name, value in weights.items() if ".base_layer." not in name}
    strange, missing = sorted(weights.keys() - own.keys()), sorted(own.keys() - weights.keys())
    if strange or missing:
        raise _misfit(
            model,
            start,
            f"{len(missing)} of the weights trained here are not in it, and {len(strange)} of its "
            f"own are not trained here, such as {(missing + strange)[0]}",
        )
    for name, value in own.items():
        if weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} in it and {tuple(value.shape)} here"
            raise _misfit(model, start, f"{name} has the shape {shapes}")
    return weights


def load_start(model: Any, start: StartAdapter) -> None:
    """Put the weights of the adapter that training starts from in place of the first ones.

    Raises:
        ConfigError: as `read_start`.
    """
    from peft import set_peft_model_state_dict

    weights = read_start(model, start)
    if start.is_checkpoint:
        load_adapter_state(model, weights)
    else:
        set_peft_model_state_dict(model, weights)


def _misfit(model: Any, start: StartAdapter, why: str) -> TrainerError:
    targets = model.peft_config["default"].target_modules
    shown = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    theirs = start.values["lora_target_modules"]
    return ConfigError.of(
        "the adapter to start from does not fit",
        where=f"adapter_name_or_path: {start.folder}",
        why=f"{why}; lora_target_modules here: {shown}; of the adapter: "
        f"{theirs if isinstance(theirs, str) else ', '.join(sorted(theirs))}",
        remedy="remove lora_target_modules, which are then taken from the adapter; or name the "
        f"base model that it was trained on, {start.base}",
    )
