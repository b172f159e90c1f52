"""Write `final_model/`: the adapter that plain PEFT loads, the tokenizer, the model card."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from . import finite
from .card import CardFacts, write_model_card
from .disk import sync
from .model.adapter import trained_parameters
from .output import FINAL


def save_initial(model: Any, folder: Path) -> Path:
    """Keep the adapter as initialised, for inits that change the base (PiSSA, OLoRA)."""
    if not (folder / "adapter_config.json").exists():
        model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def export(
    model: Any, tokenizer: Any, output_dir: Path, facts: CardFacts, initial: Path | None = None
) -> Path:
    """Write `final_model/` whole or not at all; return it.

    `initial` is the folder of `save_initial`: the adapter is then converted so that it
    fits the untouched base model.
    """
    final, beside = output_dir / FINAL, output_dir / f".{FINAL}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(model, beside, initial)
    tokenizer.save_pretrained(str(beside))
    write_model_card(beside / "README.md", facts)
    for path in (*beside.iterdir(), beside):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    beside.replace(final)
    return final


def save_adapter(
    model: Any,
    folder: Path,
    initial: Path | None = None,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the adapter in PEFT's format, converted where the init changed the base.

    `weights` are the trained parameters by name where they are not those in the model.

    Raises:
        NotFiniteError: the adapter holds NaN or infinite weights.
    """
    trained = weights if weights is not None else trained_parameters(model)
    finite.check_before_export(trained.values(), str(folder.parent))
    for lora in model.peft_config.values():
        # PEFT keeps them as a set, whose order differs from run to run.
        if isinstance(lora.target_modules, set):
            lora.target_modules = sorted(lora.target_modules)
    conversion = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    with warnings.catch_warnings():
        # PEFT warns that PiSSA and OLoRA change the base: the conversion undoes just that.
        warnings.simplefilter("ignore")
        model.save_pretrained(
            str(folder), safe_serialization=True, state_dict=weights, **conversion
        )
