"""Put a LoRA adapter on a base model, through PEFT; read and write its weights.

PEFT's modules and state names stay as they are, so that what is saved loads with plain
`PeftModel.from_pretrained`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config.schema import LoraSection
from ..config.start_adapter import StartAdapter
from ..errors import ConfigError, TrainerError
from .targets import choose_targets, is_linear, linear_remedy, targeted

# These initializations move part of the base weights into the adapter: the saved adapter must be
# converted to fit the untouched base model (PEFT doubles its rank for that).
BASE_CHANGING_INITS = ("pissa", "olora")


def changes_base(section: LoraSection) -> bool:
    """Return whether the initialization changes the base weights."""
    init = section.init_lora_weights
    return isinstance(init, str) and init.startswith(BASE_CHANGING_INITS)


def add_adapter(model: Any, section: LoraSection, *, seed: int) -> Any:
    """Return the PEFT model; the adapter's first weights depend on the seed alone.

    Trainable parameters are in float32, whatever the base model's precision.

    Raises:
        ConfigError: a target module is not in the model, or cannot be adapted so.
    """
    from peft import LoraConfig, get_peft_model

    targets = choose_targets(model, section)
    if changes_base(section):
        _refuse_large_rank(model, targets.modules, section.lora_r)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.lora_r,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=section.lora_dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
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
        adapted = get_peft_model(model, lora)
    except (ValueError, TypeError) as error:  # PEFT's word on what it cannot adapt
        raise ConfigError.of(
            "PEFT cannot add this adapter to the model",
            where="lora_target_modules, lora_target_parameters or modules_to_save",
            why=str(error).split("\n")[0],
            remedy=linear_remedy(model),
        ) from error
    for parameter in trainable_parameters(adapted).values():
        # PEFT does so for its matrices; AdamW in 16 bits would lose small updates of the rest.
        parameter.data = parameter.data.to(torch.float32)
    return adapted


def _refuse_large_rank(model: Any, targets: str | list[str], rank: int) -> None:
    """Refuse a rank beyond that of a weight that the init decomposes."""
    linear = {name: m for name, m in targeted(model, targets).items() if is_linear(m)}
    sides = {name: min(m.in_features, m.out_features) for name, m in linear.items()}
    smallest = min(sides, key=lambda name: sides[name], default="")
    if smallest and rank > sides[smallest]:
        raise ConfigError.of(
            f"lora_r {rank} is too large for pissa and olora on this model",
            where="lora_r",
            why=f"the largest possible rank is {sides[smallest]}, the smaller dimension of "
            f"{smallest}",
            remedy=f"--lora_r {sides[smallest]}",
        )


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
        ConfigError: names or shapes are not those of the adapted modules, or values not finite.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(start.weights)
    except SafetensorError as error:
        raise _unreadable(start, f"{start.weights.name}: {error}") from error
    own: dict[str, Tensor] = dict(trainable_parameters(model))
    if not start.is_checkpoint:
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        # PEFT may keep frozen embeddings in an adapter's file, too, as base_layer.weight.
        weights = {n: v for n, v in weights.items() if ".base_layer." not in n or ".lora_" in n}
    strange, missing = sorted(weights.keys() - own.keys()), sorted(own.keys() - weights.keys())
    if strange or missing:
        raise _misfit(
            model,
            start,
            f"{len(missing)} of the weights trained here are missing in it, and {len(strange)} of "
            f"its weights are not trained here, such as {(missing + strange)[0]}",
        )
    for name, value in own.items():
        if weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)} in it and {tuple(value.shape)} here"
            raise _misfit(model, start, f"{name} has the shape {shapes}")
        if not torch.isfinite(weights[name]).all():
            raise _unreadable(start, f"{name} holds NaN or infinite values")
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


def _unreadable(start: StartAdapter, why: str) -> TrainerError:
    return ConfigError.of(
        "the weights of the adapter to start from cannot be used",
        where=f"adapter_name_or_path: {start.folder}",
        why=why,
        remedy="copy the adapter again, or name an earlier checkpoint of its run",
    )


def _misfit(model: Any, start: StartAdapter, why: str) -> TrainerError:
    targets = model.peft_config["default"].target_modules
    shown = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    theirs = start.values["lora_target_modules"]
    return ConfigError.of(
        "the adapter to start from does not fit",
        where=f"adapter_name_or_path: {start.folder}",
        why=f"{why}; lora_target_modules here: {shown}; of the adapter: "
        f"{theirs if isinstance(theirs, str) else ', '.join(sorted(theirs))}",
        remedy="remove lora_target_modules to take them from the adapter; or use the base model "
        f"that it was trained on, {start.base}",
    )
