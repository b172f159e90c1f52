"""4- and 8-bit base models through bitsandbytes: availability and requirements.

Legend of memory: 4 bits keep half a byte a weight and one scale for 64 of them; double
quantization keeps those scales in 8 bits, with one float32 for 256 of them. 8 bits keep a
byte a weight and one float32 scale a row. Only linear layers are quantized: embeddings,
norms and the head stay in the compute precision. Nothing here imports torch by itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import EMBEDDED_MODEL, Config, ModelSection
from ..errors import ConfigError, Problem
from ..units import size
from . import stacks

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGE = "bitsandbytes"
# The first release whose 4- and 8-bit training on a CPU is tested here; 0.45.5 has none.
FIRST_ON_CPU = (0, 50)
NOT_INSTALLED = "the Python package bitsandbytes is not installed"
# Types whose experts are linear layers in transformers 4.50.3, which the stack cu121 has.
EXPERTS_ARE_LINEAR = ("mixtral", "olmoe", "phimoe", "qwen2_moe")
QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' classes, and PEFT's around them


def is_quantized(section: ModelSection) -> bool:
    """Return whether the base model is to be held in fewer bits."""
    return section.use_4bit or section.use_8bit


def installed_version() -> str:
    """Return the installed bitsandbytes' version; empty where there is none."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


def skip_bitsandbytes_import(config: Config) -> None:
    """Hide bitsandbytes from PEFT, which imports it wherever it is installed, if no key needs it.

    That import takes a third of a start: 5 s of processor time of 15. A model whose own
    config may ask for it keeps it: one that was never fetched from the hub.
    """
    name = config.model.model_name_or_path
    own = Path(name, "config.json")
    if name != EMBEDDED_MODEL and not own.is_file():
        own = _fetched(config.model)
    is_known = name == EMBEDDED_MODEL or own.is_file()
    if is_known and not _asked(config) and not (own.is_file() and _says_quantized(own)):
        sys.modules.setdefault(PACKAGE, None)  # type: ignore[arg-type]


def _fetched(section: ModelSection) -> Path:
    """Return the config of a hub's model in the local cache; a path to nothing if it is not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        own = try_to_load_from_cache(
            section.model_name_or_path,
            "config.json",
            cache_dir=section.model_cache_dir,
            revision=section.model_revision,
        )
    except HFValidationError:  # a path that is not there
        own = None
    return Path(own if isinstance(own, str) else "/dev/null/none")


def _says_quantized(config_file: Path) -> bool:
    return "quantization_config" in config_file.read_text(encoding="utf-8", errors="replace")


def _install() -> str:
    stack = stacks.installed()
    return stacks.install_remedy(PACKAGE, f"{'cu121' if stack == 'cu121' else 'cpu'}.txt")


def as_possible(config: Config, *, has_gpu: bool) -> tuple[Config, str]:
    """Return the config with a base that this machine can load, and why it is another than asked.

    Without a GPU and a bitsandbytes that computes on a CPU, a base in fewer bits is loaded
    unquantized: it takes more memory and rounds nothing. LoftQ corrects the rounding, so
    that it has no meaning then.
    """
    model = config.model
    if has_gpu or works_on_cpu() or not is_quantized(model):
        return config, ""
    if config.lora.init_lora_weights == "loftq":
        return config, ""
    key = "use_4bit" if model.use_4bit else "use_8bit"
    version = installed_version()
    lacks = f"bitsandbytes {version} only quantizes on GPUs" if version else NOT_INSTALLED
    whole = config.model_copy(
        update={"model": model.model_copy(update={"use_4bit": False, "use_8bit": False})}
    )
    return whole, (
        f"{key}: the base model is loaded UNQUANTIZED and takes more memory: no GPU is available, "
        f"and {lacks} (the stacks cpu and current quantize on a CPU: LORA_STACK=cpu)"
    )


def check_bitsandbytes(config: Config, *, has_gpu: bool) -> None:
    """Refuse what bitsandbytes cannot do here.

    Raises:
        ConfigError: a key asks for it, and it is missing, too old, or wants a GPU.
    """
    problems = [
        problem
        for asked, without in _asked(config)
        if (problem := _problem(asked, without, has_gpu)) is not None
    ]
    if problems:
        raise ConfigError(problems)


def check_sharding(config: Config) -> None:
    """Refuse to share out a base that would first have to be packed, whole, on each device.

    Raises:
        ConfigError: the installed bitsandbytes packs on a GPU alone.
    """
    if is_quantized(config.model) and not works_on_cpu():
        raise ConfigError.of(
            "parallelism: fsdp with a base in 4 or 8 bits needs a newer bitsandbytes",
            where="parallelism",
            why=f"bitsandbytes {installed_version() or '(none)'} only packs weights on a GPU, "
            "which would first have to hold all of them",
            remedy="--parallelism ddp; from driver 580 on, LORA_STACK=current",
        )


def is_packed(base_config: PretrainedConfig) -> bool:
    """Return whether a base model's own files hold its weights in fewer bits."""
    return getattr(base_config, "quantization_config", None) is not None


def apply_stored_quantization(
    config: Config, base_config: PretrainedConfig, *, has_gpu: bool
) -> tuple[Config, str]:
    """Return the config with the bits that the base model's own files hold.

    Those of a plain base are `as_possible`; then also why they are other ones than asked.

    Raises:
        ConfigError: another method than bitsandbytes packed them, or it cannot be used here.
    """
    if not is_packed(base_config):
        config, why = as_possible(config, has_gpu=has_gpu)
        check_bitsandbytes(config, has_gpu=has_gpu)
        return config, why
    stored = base_config.quantization_config
    method = stored.get("quant_method", PACKAGE)
    bits = {
        "use_4bit": bool(stored.get("load_in_4bit")),
        "use_8bit": bool(stored.get("load_in_8bit")),
    }
    if method != PACKAGE or not any(bits.values()):
        raise ConfigError.of(
            f"the base model is quantized by {method}",
            where="model_name_or_path",
            why="only plain weights and weights packed by bitsandbytes are supported",
            remedy="use the original model, with --use_4bit true",
        )
    kinds = {
        k: stored[k] for k in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant") if k in stored
    }
    config = config.model_copy(update={"model": config.model.model_copy(update=bits | kinds)})
    check_bitsandbytes(config, has_gpu=has_gpu)
    return config, ""


def _asked(config: Config) -> list[tuple[str, str]]:
    """Return each key that needs bitsandbytes, and how to do without."""
    keys = []
    if config.model.use_4bit:
        keys.append(("use_4bit: true", "--use_4bit false"))
    if config.model.use_8bit:
        keys.append(("use_8bit: true", "--use_8bit false"))
    if config.training.optim != "adamw":
        keys.append((f"optim: {config.training.optim}", "--optim adamw"))
    return keys


def _problem(asked: str, without: str, has_gpu: bool) -> Problem | None:
    version = installed_version()
    if "paged" in asked and not has_gpu:
        return Problem(
            "paged optimizers need a GPU",
            asked,
            "they move their state between GPU and host memory, and no GPU is available",
            f"--optim {'adamw_8bit' if '8bit' in asked else 'adamw'}",
        )
    if not version:
        return Problem(
            f"{asked} needs bitsandbytes",
            asked,
            NOT_INSTALLED,
            " or ".join(filter(None, (without, _install()))),
        )
    if not has_gpu and not works_on_cpu():
        return Problem(
            f"{asked} needs a GPU, or a newer bitsandbytes",
            asked,
            f"bitsandbytes {version} does not train on a CPU, and no GPU is available; 0.50.2 "
            "does, in the stacks cpu and current",
            f"{without}, or the stack cpu: LORA_STACK=cpu ./training/run.sh",
        )
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def works_on_cpu() -> bool:
    """Return whether the installed bitsandbytes can pack weights, and train with them, on a CPU."""
    return _release(installed_version() or "0") >= FIRST_ON_CPU


def quantization(section: ModelSection, dtype: Any) -> Any:
    """Return transformers' description of the quantization; None for a plain base model."""
    if not is_quantized(section):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=section.use_4bit,
        load_in_8bit=section.use_8bit,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare(model: Any) -> None:
    """Make a quantized base model fit for training.

    Of what PEFT's `prepare_model_for_kbit_training` does: everything is frozen, and norms
    are float32. Embeddings and head, which it widens too, stay as they are (on Llama 2 7B
    that would cost half a gigabyte); our head computes its loss in float32 anyway. Input
    gradients come with gradient checkpointing (`compat.enable_checkpointing`).
    """
    import torch

    # It says at every product that float32 inputs are cast.
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    model.requires_grad_(False)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32)
        elif is_quantized_linear(module) and model.device.type == "cpu":
            _compute_as_in_training(module)


def refuse_fused_experts(section: ModelSection, model: Any) -> None:
    """Refuse experts that bitsandbytes would silently leave in 16 bits; `model` may be unloaded.

    Raises:
        ConfigError: some are held in one tensor a layer, which is no linear layer.
    """
    from . import compat, reach

    fused = reach.fused_experts(model)
    if not is_quantized(section) or not fused:
        return
    key = "use_4bit" if section.use_4bit else "use_8bit"
    experts = sum(tensor.numel() for tensor in fused.values())
    total, _ = count_parameters(model)
    has_layers = compat.MAJOR >= 5 and model.config.model_type in EXPERTS_ARE_LINEAR
    raise ConfigError.of(
        f"{key} cannot quantize the experts of {model.config.model_type}",
        where=f"model.{key}",
        why=f"bitsandbytes only quantizes linear layers, and {reach.listed(fused)} contain "
        f"{100 * experts / total:.0f}% of the parameters in three-dimensional tensors: these "
        f"{size(2 * experts)} would stay in 16 bits",
        remedy=f"--{key} false"
        + ("; or LORA_STACK=cu121, where each expert is linear layers" * has_layers),
    )


def is_quantized_linear(module: Any) -> bool:
    """Return whether a module is a linear layer that bitsandbytes stores in 4 or 8 bits."""
    return type(module).__name__ in QUANTIZED and not hasattr(module, "base_layer")


def _compute_as_in_training(module: Any) -> None:
    """Let an evaluation on a CPU compute what the training computes.

    In evaluation bitsandbytes would round the 8-bit layers' inputs to 8 bits too (30 times
    slower, measured), and on CPUs with AVX512-BF16 repack the 4-bit weights for a kernel
    in bfloat16 that knows no gradient, so that training after it would learn nothing.
    """
    module.support_avx512bf16_for_cpu = False
    if type(module).__name__ == "Linear8bitLt":
        module.training = True
        module.train = lambda _mode=True: module


def is_prepacked(model: Any) -> bool:
    """Return whether a layer's weights were repacked for inference."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


@contextlib.contextmanager
def rows_apart(model: Any) -> Iterator[None]:
    """Let no row of an 8-bit product depend on the others, for a comparison.

    LLM.int8() computes the columns that hold an outlier, anywhere in the batch, in 16 bits:
    what a row comes to depends on its neighbours (a mean loss by 0.03 on SmolLM2). With no
    threshold it does not.
    """
    states = [m.state for m in model.modules() if is_quantized_linear(m) and hasattr(m, "state")]
    before = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def count_parameters(model: Any) -> tuple[int, int]:
    """Return a base model's parameters, and those of them that quantization leaves alone."""
    head = model.get_output_embeddings()
    linear = {
        id(module.weight): _numbers(module.weight)
        for module in model.modules()
        if hasattr(module, "in_features") and module is not head
    }
    total = {id(p): _numbers(p) for p in model.parameters()}
    return sum(total.values()), sum(n for key, n in total.items() if key not in linear)


def _numbers(parameter: Any) -> int:
    """Return how many numbers a parameter holds; 4-bit ones are packed."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def held_bytes(model: Any) -> int:
    """Return the bytes of a base model's weights with their scales, shared ones counted once."""
    bytes_of: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if tensor is not None:
            bytes_of[tensor.data_ptr()] = tensor.numel() * tensor.element_size()

    for parameter in model.parameters():
        add(parameter)
        add(getattr(parameter, "SCB", None))
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            add(state.absmax)
            add(state.state2.absmax if state.state2 is not None else None)
    for module in model.modules():
        add(getattr(getattr(module, "state", None), "SCB", None))
    return sum(bytes_of.values())
