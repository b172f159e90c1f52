"""Write `final_model/`: the adapter that plain PEFT loads, the tokenizer, the model card."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.prompt_format import PromptFormat
from ..host.disk import follow_umask, sync, write_checksums
from ..model.adapter import trainable_parameters
from ..report.model_card import CardFacts, write_model_card
from ..run_folder import RunFolder
from . import finite

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

CARD = "README.md"


def export(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    facts: CardFacts,
    prompt_format: PromptFormat,
    initial: Path | None = None,
) -> Path:
    """Write `final_model/` whole or not at all; return it.

    `initial` is the folder of `initial.save`: the adapter is then converted so that it
    fits the untouched base model.
    """
    final, beside = RunFolder(output_dir).final_model, RunFolder(output_dir).unfinished_model
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(model, beside, initial)
    save_prompt_format(beside, prompt_format, tokenizer, model.get_base_model().generation_config)
    write_model_card(beside / CARD, facts)
    write_checksums(beside)
    follow_umask(beside)
    for path in (*beside.iterdir(), beside):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    beside.replace(final)
    return final


def save_prompt_format(
    folder: Path,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
) -> None:
    """Write how the model was asked: tokenizer, generation config, and `prompt_format.json`.

    The token that ends the trained answers is an end token in each of them.
    """
    generation_config(prompt_format, tokenizer, generation).save_pretrained(str(folder))
    use_end_token(tokenizer, prompt_format)
    tokenizer.save_pretrained(str(folder))
    prompt_format.save(folder)


def with_prompt_format(
    facts: CardFacts,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
) -> CardFacts:
    """Return a card's facts with how the model is asked and where its answers end."""
    return replace(
        facts,
        prompt_kind=prompt_format.kind,
        end_tokens=tuple(tokenizer.convert_ids_to_tokens(list(prompt_format.end_token_ids))),
        stop_token_ids=tuple(stops),
    )


def use_end_token(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> None:
    """Make the trained end the tokenizer's, unless its chat template writes `eos_token` itself."""
    ends, template = prompt_format.end_token_ids, str(tokenizer.chat_template or "")
    if not ends or tokenizer.eos_token_id in ends:
        return
    if prompt_format.has_template and "eos_token" in template:
        return
    padding = tokenizer.pad_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    tokenizer.pad_token = padding


def generation_config(
    prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> Any:
    """Return the base model's generation config, with the trained end tokens before its own."""
    from transformers import GenerationConfig

    config = copy.deepcopy(generation) if generation is not None else GenerationConfig()
    stops = prompt_format.stops(tokenizer, generation)
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


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
    trainable = weights if weights is not None else trainable_parameters(model)
    finite.check_before_export(trainable.values(), str(folder.parent))
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
