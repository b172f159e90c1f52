"""Report what an adapter covers: routers that all-linear skips, experts, and the rest.

A router chooses the experts that compute a token. LoRA on it shifts the choice under experts
that stay frozen, and the loss that balances them is not part of ours. transformers 5 holds the
experts of a layer in one three-dimensional tensor, which `lora_target_parameters` names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config.schema import ALL_LINEAR, LoraSection
from ..units import size
from . import sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A module of such a name is a router, with all that is in it; a gate only by its size.
ROUTER = re.compile(r"router|gating|(^|_)expert_gate$|experts?_gate$", re.IGNORECASE)
GATE = re.compile(r"^(gate|wg|gate_fn|classifier|router)$", re.IGNORECASE)
NAMES_SHOWN = 3
MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def expert_counts(model: nn.Module) -> set[int]:
    """Return how many experts a layer has, as the configuration says; empty where none."""
    config: PretrainedConfig = model.config
    configs = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    counts = {
        value
        for each in configs
        for name, value in vars(each).items()
        if "expert" in name and "tok" not in name and type(value) is int and value > 1
    }
    if counts:  # experts that compute nothing, which routers choose too
        counts |= {
            count + int(getattr(each, "zero_expert_num", None) or 0)
            for each in configs
            for count in tuple(counts)
        }
    return counts


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with weights, by name, that belong to routers of a mixture of experts."""
    counts = expert_counts(model)
    if not counts:
        return {}
    modules = dict(model.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if _outputs(module) and _is_router(name, module, modules, counts)
    }


def _outputs(module: nn.Module) -> int:
    """Return how many numbers a linear layer, or a class like one, gives; 0 for others."""
    if hasattr(module, "in_features"):
        return int(module.out_features)  # type: ignore[arg-type]
    weight = module._parameters.get("weight")
    return weight.shape[0] if weight is not None and weight.ndim == 2 else 0


def read_past_lora(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers, by name, whose weights kernels of Mamba read past an adapter.

    Source: PEFT refuses to adapt them (`_check_lora_target_modules_mamba`).
    """
    config: PretrainedConfig = model.config
    if config.model_type not in MAMBAS:
        return {}
    modules = model.named_modules()
    return {n: m for n, m in modules if n.rsplit(".", 1)[-1] in ("out_proj", "conv1d")}


def own_products(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers, by name, whose class computes something else than a product.

    DeepSeek V4's grouped projections are such: PEFT adds a plain product of its own to theirs.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
        and not _is_product(module)
    }


@torch.no_grad()
def _is_product(linear: nn.Linear) -> bool:
    given = torch.zeros(
        1, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device
    )
    try:
        return linear(given).shape == (1, linear.out_features)
    except Exception:  # it wants its input in another shape
        return False


def _is_router(
    name: str, module: nn.Module, modules: dict[str, nn.Module], counts: set[int]
) -> bool:
    names = name.split(".")
    within = [modules[".".join(names[:end])] for end in range(1, len(names) + 1)]
    if any(ROUTER.search(part) for part in names):
        return True
    if any(re.search("Router|Gating", type(each).__name__) for each in within):
        return True
    return any(GATE.match(part) for part in names[-2:]) and _outputs(module) in counts


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors, by name, that hold all experts of a layer at once."""
    counts = expert_counts(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] in counts and "lora_" not in name
    }


def shortest(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return endings of the names, as short as can be, that none of the others has."""
    taken = {ending for other in others for ending in suffixes(other)}
    endings = set()
    for name in names:
        own = reversed(suffixes(name))
        endings.add(next((ending for ending in own if ending not in taken), name))
    return sorted(endings)


def suffixes(name: str) -> list[str]:
    """Return the name and its endings at each dot, the longest first."""
    names = name.split(".")
    return [".".join(names[start:]) for start in range(len(names))]


def notes(model: Any, total: int, section: LoraSection) -> tuple[str, ...]:
    """Return what the adapter covers, leaves out and costs, for the plan.

    `total` are all parameters of the base model; `model` is the PEFT model.
    """
    base = model.get_base_model()
    modules = {n: m for n, m in base.named_modules() if "lora_" not in n}
    adapters = {name: module for name, module in modules.items() if hasattr(module, "lora_A")}
    adapted = {_bare(name) for name in adapters}
    gates = [name for name in routers(base) if name in modules and _bare(name) == name]
    wrapped = {
        f"{_bare(name)}.{module.parameter_name}"
        for name, module in adapters.items()
        if hasattr(module, "parameter_name")
    }
    experts = {_bare(name): tensor for name, tensor in fused_experts(base).items()}
    fused = [name for name in experts if name not in wrapped]
    head = base.get_output_embeddings()
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module is not head and _bare(name) not in adapted
    ]
    is_all_linear = section.lora_target_modules == ALL_LINEAR
    left = (
        ("routers", [name for name in gates if name not in adapted] if is_all_linear else []),
        ("experts fused in one tensor", fused),
        ("linear layers", [name for name in linear if name not in gates] if is_all_linear else []),
    )
    # One module may be adapted twice: PEFT nests what it puts around its parameters.
    reached = sum(_numbers(module) for module in adapters.values())
    lines = (
        [_left_out(100 * reached / total, left, fused, section)] if any(n for _, n in left) else []
    )
    if asked := [name for name in gates if name in adapted]:
        lines.append(
            f"the adapter changes routers ({listed(asked)}), and thereby the choice of experts, "
            "without a balancing loss"
        )
    if copied := {name: tensor for name, tensor in experts.items() if name in wrapped}:
        lines.append(_copied(copied, sizes.layers(base.config) or 1))
    if getattr(sizes.text_config(base.config), "output_router_logits", False):
        lines.append(
            "the expert-balancing loss (output_router_logits) is not added, because it trains the "
            "routers, which stay frozen"
        )
    return tuple(lines)


def _left_out(
    percent: float,
    left: Iterable[tuple[str, list[str]]],
    fused: list[str],
    section: LoraSection,
) -> str:
    """Say which share of the parameters is reached, what is left out and how it could be had."""
    out = ", ".join(f"{kind} ({listed(names)})" for kind, names in left if names)
    text = f"the adapter reaches {percent:.0f}% of the parameters, and leaves out {out}"
    if not fused:
        return text
    without = [key for key in ("lora_dropout", "use_dora") if getattr(section, key)]
    only = f", without {' and '.join(without)}" * bool(without)
    return f"{text}; to train the experts: --lora_target_parameters {','.join(_last(fused))}{only}"


def _copied(experts: dict[str, nn.Parameter], layers: int) -> str:
    """Say what experts cost that are adapted as parameters, and where such an adapter is served."""
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in experts.values())
    return (
        f"experts are adapted as parameters ({listed(experts)}): each layer uses a copy of them, "
        f"{size(numbers // layers)}, kept for the backward pass unless gradient_checkpointing is "
        "on; some versions of vLLM and SGLang silently ignore such experts: compare the answers "
        "there, or merge the adapter"
    )


def _bare(name: str) -> str:
    """Return a module's name without what PEFT puts into it."""
    return name.replace(".base_layer", "")


def _numbers(adapted: Any) -> int:
    """Return how many parameters of the base model an adapted module has."""
    if hasattr(adapted, "parameter_name"):
        return int(adapted.get_param().numel())
    return int(adapted.in_features * adapted.out_features)


def listed(names: Iterable[str]) -> str:
    """Return the last parts of the names, each once, a few of them."""
    last = _last(names)
    more = f" and {len(last) - NAMES_SHOWN} more" if len(last) > NAMES_SHOWN else ""
    return ", ".join(last[:NAMES_SHOWN]) + more


def _last(names: Iterable[str]) -> list[str]:
    """Return the last two parts of the names, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
