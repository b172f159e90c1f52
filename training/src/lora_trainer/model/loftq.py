"""LoftQ: initialize the adapter to correct the rounding of the base to 4 bits.

For each adapted layer with weight W, held as Q, and the adapter's scale s: s B A is the best
approximation of W - Q of its rank. Source: Li et al., arXiv:2310.08659, with one step of its
iteration, as PEFT does it for models in 4 bits; PEFT's own function computes on a GPU alone
and leaves s out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import LoraSection, ModelSection
from ..errors import ConfigError

INIT = "loftq"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def begin_from_residuals(model: Any, folder: Path) -> None:
    """Set A and B of every adapted 4-bit layer from the full weights in a model's folder.

    Raises:
        ConfigError: the folder's weights are not named as the model's layers are.
    """
    weights = _Weights(folder)
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A") or not hasattr(
            layer.get_base_layer().weight, "quant_state"
        ):
            continue
        held = layer.get_base_layer().weight
        a, b = low_rank(
            weights.read(f"{name}.weight").to(held.device) - _widened(held), layer.r["default"]
        )
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b / layer.scaling["default"])


def low_rank(residual_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, I) and B (O, rank) whose product B A is nearest to the residual (O, I)."""
    u_OK, s_K, v_KI = torch.linalg.svd(residual_OI, full_matrices=False)
    root = s_K[:rank].sqrt()
    a, b = root[:, None] * v_KI[:rank], u_OK[:, :rank] * root
    missing = rank - len(root)
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


def _widened(held: Any) -> Tensor:
    import bitsandbytes

    widened: Tensor = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    return widened.float()


class _Weights:
    """The full-precision weights of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        self.files: dict[str, str] = (
            json.loads(index.read_text())["weight_map"] if index.exists() else {}
        )

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.folder / self.files.get(name, SINGLE), framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  it is no mapping
                tensor: Tensor = file.get_tensor(name)
                return tensor.float()
        raise ConfigError.of(
            "init_lora_weights: loftq cannot find the full weights",
            where=f"model_name_or_path: {self.folder}",
            why=f"its files do not contain {name}: this architecture stores its layers under "
            "other names",
            remedy="--init_lora_weights true",
        )


def note(lora: LoraSection, model: ModelSection) -> str:
    """Return what users of the adapter must know; empty without this init."""
    if lora.init_lora_weights != INIT:
        return ""
    return (
        "The adapter was initialized with LoftQ: it corrects the rounding of the base model to 4 "
        f"bits ({model.bnb_4bit_quant_type}), so load the base model in the same way."
    )
