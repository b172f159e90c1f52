"""How far an adapter reaches: routers that all-linear leaves alone, experts, and what remains.

A router chooses the experts that compute a token. LoRA on it shifts the choice under experts
that stay frozen, and the loss that balances them is not part of ours. transformers 5 holds the
experts of a layer in one three-dimensional tensor. PEFT adapts it for some architectures
(Mixtral, Qwen 3 MoE, DeepSeek V3 and their like), in place of the linear layers of the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# A module of such a name is a router, with all that is in it; a gate only by its size.
ROUTER = re.compile(r"router|gating|(^|_)expert_gate$|experts?_gate$", re.IGNORECASE)
GATE = re.compile(r"^(gate|wg|gate_fn|classifier|router)$", re.IGNORECASE)
NAMES_SHOWN = 3
MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def expert_counts(model: nn.Module) -> set[int]:
    """Return how many experts a layer has, as the configuration says; empty where none."""
    config: Any = model.config
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


def is_router_parameter(name: str) -> bool:
    """Tell whether PEFT's name of a parameter, such as gate.weight, is that of a router."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and bool(ROUTER.search(module) or GATE.match(module))


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
    config: Any = model.config
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
    parts = name.split(".")
    within = [modules[".".join(parts[:end])] for end in range(1, len(parts) + 1)]
    if any(ROUTER.search(part) for part in parts):
        return True
    if any(re.search("Router|Gating", type(each).__name__) for each in within):
        return True
    return any(GATE.match(part) for part in parts[-2:]) and _outputs(module) in counts


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
    rest = list(others)
    endings = set()
    for name in names:
        parts = name.split(".")
        for start in reversed(range(len(parts))):
            ending = ".".join(parts[start:])
            if not any(other == ending or other.endswith(f".{ending}") for other in rest):
                break
        endings.add(ending)
    return sorted(endings)


def notes(model: Any, total: int, *, is_all_linear: bool) -> tuple[str, ...]:
    """Say for the plan what all-linear leaves out, and whether a router is adapted.

    `total` are all parameters of the base model; `model` is the PEFT model.
    """
    base = model.get_base_model()
    modules = {n: m for n, m in base.named_modules() if "lora_" not in n}
    adapted = {_bare(name): module for name, module in modules.items() if hasattr(module, "lora_A")}
    gates = [name for name in routers(base) if name in modules and _bare(name) == name]
    wrapped = {
        f"{_bare(name)}.{module.parameter_name}"
        for name, module in modules.items()
        if hasattr(module, "parameter_name")
    }
    fused = [name for name in map(_bare, fused_experts(base)) if name not in wrapped]
    head = base.get_output_embeddings()
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module is not head and _bare(name) not in adapted
    ]
    linear = [name for name in linear if name not in gates]
    said = []
    if asked := [name for name in gates if name in adapted]:
        said.append(
            f"lora_target_modules names routers ({_listed(asked)}): adapting them changes which "
            "experts are chosen, without a loss that balances them"
        )
    left = (
        ("routers", [name for name in gates if name not in adapted]),
        ("experts fused in one tensor", fused),
        ("linear layers", linear),
    )
    reached = sum(_numbers(module) for module in adapted.values())
    share = f"{100 * reached / total:.0f}% of the parameters"
    out = [f"{kind} ({_listed(names)})" for kind, names in left if names]
    if out and is_all_linear:
        said.append(f"the adapter reaches {share}, and leaves out {', '.join(out)}")
    return tuple(said)


def _bare(name: str) -> str:
    """Return a module's name without what PEFT puts into it."""
    return name.replace(".base_layer", "")


def _numbers(adapted: Any) -> int:
    """Return how many parameters of the base model an adapted module has."""
    if hasattr(adapted, "parameter_name"):
        return int(adapted.get_param().numel())
    return int(adapted.in_features * adapted.out_features)


def _listed(names: Iterable[str]) -> str:
    """Return the last parts of the names, each once, a few of them."""
    last = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    more = f" and {len(last) - NAMES_SHOWN} more" if len(last) > NAMES_SHOWN else ""
    return ", ".join(last[:NAMES_SHOWN]) + more
