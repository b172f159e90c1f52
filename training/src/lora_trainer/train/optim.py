"""AdamW over the adapter's parameters; `set_learning_rate` is called before each step.

bitsandbytes can keep its state in 8 bits, or page it to host memory when a GPU is full. In
bitsandbytes, parameters with fewer than 4,096 elements keep 32-bit state.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config.schema import TrainingSection

# LoRA+ sets apart the matrices B by PEFT's names of them. Source: arXiv:2402.12354.
B_NAMES = ("lora_B", "lora_embedding_B")


def make_optimizer(
    parameters: dict[str, torch.nn.Parameter],
    section: TrainingSection,
    loraplus_lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """Return AdamW over the named parameters, without weight decay for vectors.

    Its `lr` is only the initial value: `loop` sets the rate of every step from the plan with
    `set_learning_rate`, multiplied by each group's `rate_factor` (LoRA+).
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_b = loraplus_lr_ratio is not None and any(part in name for part in B_NAMES)
        factor = loraplus_lr_ratio if is_b and loraplus_lr_ratio is not None else 1.0
        decay = section.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return _adamw(section.optim)(
        [
            {"params": members, "weight_decay": decay, "rate_factor": factor}
            for (factor, decay), members in groups.items()
        ],
        lr=section.learning_rate,  # the loop sets each step's before that step
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
    )


def _adamw(kind: str) -> Any:
    if kind == "adamw":
        return torch.optim.AdamW
    import bitsandbytes.optim

    names = {
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
    }
    return getattr(bitsandbytes.optim, names[kind])


def raise_versions(optimizer: torch.optim.Optimizer) -> None:
    """Let PyTorch know, after a step, that every parameter has changed.

    bitsandbytes' kernels write to a parameter's memory without raising its version, by which
    `fused.Group` knows that its adapters in the compute precision are those of an earlier step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.autograd.graph.increment_version(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
