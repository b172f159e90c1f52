"""Merge an adapter into its base model, for servers that load whole models only.

The result is read back from disk and compared with base model and adapter: it is kept if the logits
are equal.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError, InternalError, MemoryKilledError
from ..units import size
from .finetuned import ADAPTER_WEIGHTS, FinetunedModel, LoadedModel, locate_base, open_model
from .new_folder import atomic_directory, refuse_existing, refuse_full_disk

if TYPE_CHECKING:
    from ..model.forward import CausalLM
    from ..model.load import ModelSource

CARD = "README.md"
SHARD_BYTES = 5_000_000_000
ASKED_TOKENS = 32
# Largest difference of a logit, as a share of the largest logit, that rounding explains:
# of the products in float32, and of the weights where they are stored in 16 bits.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
# Sections of the adapter's card that are true of the merged model too.
KEPT_SECTIONS = ("Training data", "Results", "Hyperparameters", "Versions")


@dataclass(frozen=True, slots=True)
class Stored:
    """The base model's weights as they are stored: their type's name and their bytes."""

    dtype: str
    bytes: int

    @property
    def as_float32(self) -> int:
        """Return the bytes that they take in float32."""
        return self.bytes * (1 if self.dtype == "float32" else 2)


def merge(finetuned: FinetunedModel, target: Path) -> None:
    """Write base model and adapter as one model, tokenizer and card included.

    Raises:
        ConfigError: there is no adapter, or the target already exists.
        StorageError, MemoryKilledError: disk or memory have no room for it.
        InternalError: the merged model answers otherwise; nothing is left behind.
    """
    if finetuned.adapter is None:
        raise ConfigError.of(
            "there is no adapter to merge",
            where=finetuned.name,
            why="it is already a complete model",
            remedy="use a run's folder or an adapter's folder",
        )
    refuse_existing(target)
    if finetuned.config.lora.init_lora_weights == "loftq":
        raise ConfigError.of(
            "a LoftQ adapter cannot be merged",
            where="lora.init_lora_weights: loftq",
            why="it corrects the rounding of its quantized base model, but a merged model is not "
            "rounded",
            remedy="serve the adapter on the base model quantized as in training",
        )
    # Quantized weights cannot take a sum: the adapter goes into the model as it was before.
    whole = finetuned.as_loaded(use_4bit=False, use_8bit=False)
    source = locate_base(whole)
    stored = stored_weights(source, whole)
    stored = replace(
        stored, bytes=stored.bytes + untied_bytes(finetuned.adapter, source, whole, stored)
    )
    refuse_full_disk(target, stored.bytes)
    _refuse_small_memory(stored)
    typer.echo(f"loading {source.name} ...", err=True)
    difference = _merge(whole, stored, target)
    written = sum(one.stat().st_size for one in target.glob("*.safetensors"))
    typer.echo(f"the merged model was written to {target} ({size(written)}, {stored.dtype})")
    typer.echo(
        f"its logits equal those of base model and adapter (largest difference {difference:.1e})"
    )


def stored_weights(source: ModelSource, finetuned: FinetunedModel) -> Stored:
    """Return type and size of the base model's weights; the hub's files are not asked for size."""
    import torch

    from ..model import load

    config = load.load_config(source, finetuned.config.model)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    name = str(dtype).removeprefix("torch.")
    name = name if name in TOLERANCES else "float32"
    if source.is_local:
        stored_bytes = sum(one.stat().st_size for one in Path(source.path).glob("*.safetensors"))
        return Stored(name, stored_bytes)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(one.numel() for one in model.parameters())
    return Stored(name, parameters * (4 if name == "float32" else 2))


def untied_bytes(
    adapter: Path, source: ModelSource, finetuned: FinetunedModel, stored: Stored
) -> int:
    """Return the bytes of the second matrix where merging parts a tied head and embeddings.

    That is where the adapter changes either of them: they are one no longer.
    """
    from safetensors import safe_open

    from ..model import load

    config = load.load_config(source, finetuned.config.model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary, width = getattr(text, "vocab_size", 0), getattr(text, "hidden_size", 0)
    if not getattr(config, "tie_word_embeddings", False):
        return 0
    with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    if not any(vocabulary in shape for shape in shapes):
        return 0
    return vocabulary * width * (4 if stored.dtype == "float32" else 2)


def _refuse_small_memory(stored: Stored) -> None:
    from ..machine import read_machine

    # The weights, and a second model that is read back to be compared.
    needed, limit = 2 * stored.as_float32, read_machine().memory_bytes
    if needed > limit:
        raise MemoryKilledError.of(
            "there is not enough memory to merge",
            where=f"{size(limit)} of memory",
            why=f"base model and merged model take {size(needed)} in float32",
            remedy="merge on a machine with more memory; to serve it, many servers load adapters",
        )


def _merge(finetuned: FinetunedModel, stored: Stored, target: Path) -> float:
    """Merge and write; return the largest difference of the logits, checked."""
    import torch

    from ..model import load
    from ..model.forward import CausalLM

    opened = open_model(finetuned, is_exact=True)
    backend = opened.backend
    asked = _tokens(opened.causal.inner)
    expected = _logits(opened.causal, asked)
    model = _merged(opened.causal.model)
    with atomic_directory(target) as folder:
        typer.echo("writing ...", err=True)
        kept = model.to(getattr(torch, stored.dtype))
        kept.config.use_cache = True
        _use_trained_ends(kept, opened)
        kept.save_pretrained(str(folder), safe_serialization=True, max_shard_size=SHARD_BYTES)
        opened.tokenizer.save_pretrained(str(folder))
        opened.prompt_format.save(folder)
        _write_card(folder / CARD, finetuned, opened.source)
        chunk = opened.causal.chunk
        del model, kept, opened.causal
        typer.echo("checking ...", err=True)
        section = finetuned.config.model.model_copy(update={"model_name_or_path": str(folder)})
        read_back = load.load_model(
            load.ModelSource(str(folder), target.name),
            section,
            dtype=backend.dtype,
            device=backend.device_name,
            attention=backend.attention,
        )
        merged = CausalLM(
            read_back,
            device=backend.device_name,
            padding_free=False,
            chunk=chunk,
            precision=backend.precision,
        )
        difference = float((_logits(merged, asked) - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCES[stored.dtype]:
            raise InternalError.of(
                "the merged model differs from base model and adapter",
                where=str(target),
                why=f"a logit differs by {difference:.1e} of the largest, more than rounding to "
                f"{stored.dtype} explains ({TOLERANCES[stored.dtype]:.0e}); nothing was kept",
                remedy="serve the adapter beside its base model, and report this model type as a "
                "bug",
            )
    return difference


def _merged(model: Any) -> Any:
    """Return the plain model with the adapter in its weights."""
    import torch

    inner = model.get_base_model()
    adapted = [inner.get_output_embeddings(), inner.get_input_embeddings()]
    adapted = [
        one for one in adapted if hasattr(one, "base_layer") or hasattr(one, "modules_to_save")
    ]
    if adapted and inner.config.tie_word_embeddings:
        # One changes without the other: from here on they are two matrices.
        for module in adapted:
            plain = getattr(module, "base_layer", None)
            if plain is not None:
                weight = plain.weight.detach().clone()
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        inner.config.tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=True)


def _use_trained_ends(model: Any, opened: LoadedModel) -> None:
    """Have the merged model stop where the trained answers end, by its own defaults."""
    from ..train.export import generation_config, use_end_token

    config = generation_config(opened.prompt_format, opened.tokenizer, model.generation_config)
    use_end_token(opened.tokenizer, opened.prompt_format)
    model.generation_config = config
    model.config.eos_token_id = config.eos_token_id


def _tokens(model: Any) -> Any:
    import torch

    from ..model import sizes

    generator = torch.Generator().manual_seed(0)
    most = sizes.positions(model.config) or ASKED_TOKENS
    shape = (1, min(ASKED_TOKENS, most))
    return torch.randint(0, sizes.vocabulary(model.config), shape, generator=generator)


def _logits(causal: CausalLM, asked: Any) -> Any:
    import torch

    causal.model.eval()
    with torch.no_grad(), causal.autocast():
        return causal.model(input_ids=asked, use_cache=False).logits.float()


def _write_card(path: Path, finetuned: FinetunedModel, source: ModelSource) -> None:
    """Write a card for the whole model, with what the adapter's own card says of its training."""
    from ..model.load import find_license

    assert finetuned.adapter is not None
    try:
        card = (finetuned.adapter / CARD).read_text(encoding="utf-8")
    except OSError:
        card = ""
    base = source.hub_id or source.name
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if source.hub_id:
        front.append(f"base_model: {json.dumps(source.hub_id)}")
    front += re.findall(r"^license(?:_name)?: .*$", card.partition("\n---")[0], re.MULTILINE)
    titles = "|".join(map(re.escape, KEPT_SECTIONS))
    sections = re.findall(rf"^## (?:{titles})\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    lines = [
        "---", *front, "---", "",
        f"# {finetuned.name}, merged", "",
        f"`{base}` with a LoRA adapter merged into its weights.", "",
        f"Licence of the base model: {find_license(source) or 'not known'}", "",
        "## Use", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'folder = "."  # this folder, or the hub id under which it was uploaded',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder).eval()",
        "```", "",
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n" + "\n".join(sections), encoding="utf-8")
