"""Which modules and parameters of a base model an adapter adapts, checked against that model.

`lora_target_modules` names modules. all-linear means every linear layer but the head, routers,
and what PEFT cannot adapt. transformers 5 holds the experts of a layer in one three-dimensional
tensor, which is no linear layer: `lora_target_parameters` names such tensors. PEFT itself turns
all-linear, and names such as down_proj, into those tensors for some architectures and not for
others (`convert_peft_config_for_transformers`), in place of the linear layers of these names.
Here a name means what it says; docs/decisions/0019-mixtures-of-experts.md gives the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..config.schema import ALL_LINEAR, LoraSection
from ..errors import ConfigError, TrainerError
from . import compat, reach

NAMES = re.compile(r"\s*[\w.\-]+(\s*,\s*[\w.\-]+)*\s*")  # else a regular expression
# What PEFT can do with a parameter; its other inits read the weight of a linear layer.
PARAMETER_INITS = (True, False, "gaussian")


@dataclass(frozen=True, slots=True)
class Targets:
    """PEFT's `target_modules` and `target_parameters`."""

    modules: str | list[str]
    parameters: list[str]


def choose_targets(model: Any, section: LoraSection) -> Targets:
    """Return what PEFT is asked to adapt.

    Raises:
        ConfigError: a name is not in the model, or PEFT cannot adapt it so.
    """
    targets = named_targets(section.lora_target_modules)
    parameters = list(section.lora_target_parameters)
    _refuse_unknown_modules(model, targets, section.modules_to_save)
    _refuse_unknown_parameters(model, parameters)
    diverted = _names_taken_for_experts(model)
    alone = left_alone(model) if targets == ALL_LINEAR else {}
    if not diverted and not alone:
        return Targets(targets, parameters)
    return _explicit(model, section, targets, alone, diverted)


def named_targets(targets: str | list[str]) -> str | list[str]:
    """Return all-linear, a list of names, or a regular expression that compiles.

    Raises:
        ConfigError: it is none of these.
    """
    if not isinstance(targets, str) or targets == ALL_LINEAR:
        return targets
    if NAMES.fullmatch(targets):
        return [part.strip() for part in targets.split(",")]
    try:
        re.compile(targets)
    except re.error as error:
        raise ConfigError.of(
            "lora_target_modules is not a valid regular expression",
            where="lora_target_modules",
            why=str(error),
            remedy="write names such as q_proj,v_proj, or an expression such as .*(q|v)_proj",
        ) from None
    return targets


def targeted(model: Any, targets: str | list[str]) -> dict[str, Any]:
    """Return the modules, by name, that the targets mean."""
    modules = {name: module for name, module in model.named_modules() if name}
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        classes = (torch.nn.Linear, Conv1D)  # those of PEFT: others only look like linear layers
        return {n: m for n, m in modules.items() if isinstance(m, classes) and m is not head}
    if isinstance(targets, str):
        return {n: m for n, m in modules.items() if re.fullmatch(targets, n)}
    return {n: m for n, m in modules.items() if not set(targets).isdisjoint(reach.suffixes(n))}


def is_linear(module: Any) -> bool:
    """Return whether a module is a linear layer, or a class like one."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_remedy(model: Any) -> str:
    """Return the remedy that lists the linear layers' names."""
    return f"use some of {_linear_names(model)}, or all-linear"


def left_alone(model: Any) -> dict[str, Any]:
    """Return the modules, by name, that all-linear leaves alone: routers, what PEFT cannot adapt.

    Routers of classes of their own, which are no linear layers, are among them.
    """
    return reach.routers(model) | reach.read_past_lora(model) | reach.own_products(model)


def _names_taken_for_experts(model: Any) -> set[str]:
    """Return the last parts of modules' names that PEFT takes for experts on transformers 5."""
    if compat.MAJOR < 5 or not reach.fused_experts(model):
        return set()
    leaves = {_leaf(name) for name, _ in model.named_modules() if name}
    return {leaf for leaf in leaves if _is_taken_for_experts(model, leaf)}


def _is_taken_for_experts(model: Any, leaf: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it wants the names of all that is fused into one tensor
        return True
    return not config.target_modules


def _explicit(
    model: Any,
    section: LoraSection,
    targets: str | list[str],
    alone: Iterable[str],
    diverted: set[str],
) -> Targets:
    """Name modules, without those left alone, so that PEFT takes none of them for experts.

    A linear layer of a diverted name is adapted through its weight: what is computed, and the
    names in the adapter's file, are those of a linear layer.
    """
    matched = [name for name in targeted(model, targets) if name not in alone]
    through_weight = [name for name in matched if _leaf(name) in diverted]
    direct = [name for name in matched if _leaf(name) not in diverted]
    if why := _unfit_for_parameters(section):
        if targets != ALL_LINEAR and through_weight:
            raise _diverted_refusal(through_weight, why)
        through_weight = []
    named = {parameter for parameter, _ in model.named_parameters()}
    weights = {f"{name}.weight" for name in through_weight} & named
    if isinstance(targets, str):
        others = {name for name, _ in model.named_modules()} - set(direct)
        modules = reach.shortest(direct, others)
    else:
        modules = [name for name in targets if _leaf(name) not in diverted]
    parameters = [*section.lora_target_parameters, *reach.shortest(weights, named - weights)]
    return Targets(modules, parameters)


def _unfit_for_parameters(section: LoraSection) -> str:
    """Return the key that PEFT does not know for parameters; empty where there is none."""
    if section.lora_dropout:
        return f"lora_dropout {section.lora_dropout:g}"
    if section.use_dora:
        return "use_dora"
    if section.init_lora_weights not in PARAMETER_INITS:
        return f"init_lora_weights: {section.init_lora_weights}"
    return ""


def _diverted_refusal(names: list[str], why: str) -> TrainerError:
    shown, key = ", ".join(dict.fromkeys(map(_leaf, names))), why.partition(" ")[0].rstrip(":")
    return ConfigError.of(
        f"{shown} cannot be adapted with {why} on this model",
        where="lora_target_modules",
        why="PEFT treats these names as the model's experts, so the linear layers are adapted "
        f"through their weights, which cannot be combined with {key}",
        remedy=f"remove {shown} from lora_target_modules, or {key}",
    )


def _refuse_unknown_modules(
    model: Any, targets: str | list[str], modules_to_save: list[str]
) -> None:
    if isinstance(targets, str) and targets != ALL_LINEAR and not targeted(model, targets):
        raise ConfigError.of(
            "lora_target_modules matches no module of the model",
            where="lora_target_modules",
            why="a regular expression must match a module's whole name, such as "
            + next((n for n, m in model.named_modules() if is_linear(m)), "layers.0.q_proj"),
            remedy=linear_remedy(model),
        )
    names = {part for name, _ in model.named_modules() for part in reach.suffixes(name)}
    asked = [] if isinstance(targets, str) else list(targets)
    unknown = [name for name in (*asked, *modules_to_save) if name not in names]
    if unknown:
        experts = fused_names(model)
        raise ConfigError.of(
            f"the model has no module named {', '.join(unknown)}",
            where="lora_target_modules or modules_to_save",
            why=f"its linear modules are {_linear_names(model)}",
            remedy="use some of these, or all-linear"
            + (f"; for its experts: --lora_target_parameters {','.join(experts)}" * bool(experts)),
        )


def _refuse_unknown_parameters(model: Any, asked: list[str]) -> None:
    parameters = dict(model.named_parameters())
    unknown = [one for one in asked if not any(_ends(name, one) for name in parameters)]
    packed = [
        one
        for one in asked
        for name, parameter in parameters.items()
        if _ends(name, one) and not parameter.is_floating_point()
    ]
    if not unknown and not packed:
        return
    experts = fused_names(model)
    what = "has no parameter named" if unknown else "holds in fewer bits"
    raise ConfigError.of(
        f"the model {what} {', '.join(dict.fromkeys(unknown or packed))}",
        where="lora_target_parameters",
        why=f"its experts are {', '.join(experts)}"
        if experts
        else "it has no experts in a single tensor: use lora_target_modules for its layers",
        remedy=f"--lora_target_parameters {','.join(experts)}"
        if experts
        else "remove lora_target_parameters",
    )


def fused_names(model: Any) -> list[str]:
    """Return endings of the names of tensors that hold all experts of a layer."""
    fused = [name.replace(".base_layer", "") for name in reach.fused_experts(model)]
    names = (name.replace(".base_layer", "") for name, _ in model.named_parameters())
    others = set(names) - set(fused)
    return list(dict.fromkeys(_last_two_names(name, others) for name in fused))


def _last_two_names(name: str, others: Iterable[str]) -> str:
    """Return a parameter's name with that of its module, or more where others end so too."""
    names = name.split(".")
    for start in reversed(range(max(1, len(names) - 1))):
        ending = ".".join(names[start:])
        if not any(_ends(other, ending) for other in others):
            return ending
    return name


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _linear_names(model: Any) -> str:
    linear = {_leaf(name) for name, module in model.named_modules() if is_linear(module)}
    return ", ".join(sorted(linear - {"base_layer", "default"}))


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
