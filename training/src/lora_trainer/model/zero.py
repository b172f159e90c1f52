"""Shard the frozen layers with DeepSpeed's ZeRO stage 3, through Accelerate.

DeepSpeed only gets the layers' frozen modules. Adapter, optimizer and checkpoint are as in a single
process, so that a run can resume with another number of processes, or without DeepSpeed. Unlike
fsdp, it can keep the layers in host memory and move each to the GPU when needed
(`offload_param_device`).

It is an extra, installed by hand (requirements/deepspeed.txt). Source: https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..config.schema import Config
from ..errors import ConfigError, TrainerError, UnavailableError
from .quantize import is_quantized
from .stacks import install_remedy

if TYPE_CHECKING:  # `check` answers without torch
    from torch import nn

    from .ranks import Ranks

PACKAGE = "deepspeed"
# What torch 2.1.2 lacks on a CPU is what DeepSpeed gathers with, so none of it is tested there.
FIRST_TORCH = (2, 6)
# DeepSpeed's key for weights of a type that is not float32.
HALVES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


def check(config: Config) -> None:
    """Refuse `parallelism: deepspeed` where it cannot be; imports neither torch nor DeepSpeed.

    Raises:
        ConfigError: the base is in 4 or 8 bits, DeepSpeed is missing, or torch is too old.
    """
    if is_quantized(config.model):
        why = "ZeRO does not support the scales that bitsandbytes stores beside packed weights"
        _refuse("with a base in 4 or 8 bits is not supported", why, "--parallelism fsdp")
    torch = importlib.metadata.version("torch")
    if tuple(int(part) for part in torch.split(".")[:2]) < FIRST_TORCH:
        why = f"with torch {torch} it is untested, because that needs a GPU"
        _refuse(
            "needs torch 2.6 or newer",
            why,
            "--parallelism fsdp, or LORA_STACK=current ./training/run.sh",
        )
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        add = install_remedy(PACKAGE, "deepspeed.txt") or "./training/build.sh --extra deepspeed"
        remedy = f"{add}; or --parallelism fsdp"
        _refuse(
            "needs DeepSpeed",
            "the Python package deepspeed, an optional extra, is not installed",
            remedy,
        )


def _refuse(what: str, why: str, remedy: str) -> None:
    raise ConfigError.of(
        f"parallelism: deepspeed {what}", where="training.parallelism", why=why, remedy=remedy
    )


def shard_layers(
    layers: nn.ModuleList, decoder: nn.Module, device: str, ranks: Ranks, *, is_offloaded: bool
) -> None:
    """Share the layers' frozen weights out; all ranks must, at the same time.

    Weights that stand beside trained ones (a frozen weight with a trained bias, say) stay
    whole on every rank. Afterwards `torch.nn.functional.linear` is DeepSpeed's, in the whole
    process: for the backward pass it keeps the weight's name instead of its numbers, and
    each projection's input, which PyTorch's does not need where the weight is frozen.

    Raises:
        UnavailableError: experts are modules of their own, of which ranks would take others.
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch import nn

    from . import fused
    from .gather import move
    from .ranks import form_group

    class FrozenModules(nn.ModuleList):
        """What DeepSpeed takes for the model; its forward pass says that the real one begins."""

        def forward(self) -> None:
            """Compute nothing; ZeRO's hooks start the order of their gathers again."""

    for name, module in layers.named_modules():
        if ranks.count > 1 and name.endswith("experts") and isinstance(module, nn.ModuleList):
            why = (
                f"each process would gather different experts of {name} and wait forever for the "
                "others"
            )
            raise _model_refusal(why)
    fused.split(layers)  # whose weights come when a module is called
    form_group(ranks, device)
    deepspeed = _imported(device, ranks)
    frozen = FrozenModules(module for module in layers.modules() if _is_shared(module))
    settings = _settings(frozen, len(layers), device, is_offloaded)
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    half = next((key for key in HALVES.values() if key in settings), "no")
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=half)
    # Before Accelerate would move all of it to the device at once.
    deepspeed.zero.Init(module=frozen, config_dict_or_path=settings)
    accelerator.prepare(frozen)
    decoder.register_forward_pre_hook(lambda *_: frozen())
    for parameter in layers.parameters():
        if not hasattr(parameter, "ds_id"):
            move(parameter, device)


@contextlib.contextmanager
def names_what_it_cannot() -> Iterator[None]:
    """Refuse by name a model whose first forward pass finds weights that are not there.

    Raises:
        UnavailableError: a module reads another one's weights.
    """
    import torch

    from .ranks import is_peer_lost

    try:
        yield
    except (IndexError, RuntimeError) as error:
        if is_peer_lost(error) or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        why = f"weights are read outside the module that owns them ({error})"
        raise _model_refusal(why) from error


def _model_refusal(why: str) -> TrainerError:
    return UnavailableError.of(
        "DeepSpeed cannot shard this model",
        where="parallelism: deepspeed",
        why=why,
        remedy="--parallelism fsdp",
    )


def _is_shared(module: nn.Module) -> bool:
    """Return whether ZeRO takes a module: all its weights are its own, and frozen.

    Convolutions are small, and read by others than themselves (Mamba's kin do).
    """
    from torch import nn

    own = list(module.parameters(recurse=False))
    is_whole = len(own) == len(list(module.parameters()))
    is_frozen = not any(parameter.requires_grad for parameter in own)
    return bool(own) and is_whole and is_frozen and not isinstance(module, nn.Conv1d)


def _imported(device: str, ranks: Ranks) -> Any:
    """Import DeepSpeed, and tell it and Accelerate in which process they are."""
    import torch

    variables = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.count}
    variables["LOCAL_WORLD_SIZE"] = ranks.local_count
    os.environ |= {key: str(value) for key, value in variables.items()}
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": device}
    # Without it Accelerate would choose the number of threads again.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # DeepSpeed 0.19 calls by its old name what torch 2.13 has renamed; users can do nothing.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Sums through shared memory, for its inference: compiled at the first start,
    # for half a minute, where a compiler is, and failing where none is.
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(frozen: nn.Module, layers: int, device: str, is_offloaded: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings; sizes are counts of weights.

    A layer is whole while it computes, the next one on its way, and what arrives lies in a
    buffer first: up to 3.4 layers were found whole at a time. Norms and biases are small,
    and stay whole once they were gathered.
    """
    parameters = list(frozen.parameters())
    half = HALVES.get(str(parameters[0].dtype))
    layer = -(-sum(parameter.numel() for parameter in parameters) // max(1, layers))
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_reuse_distance": layer,
        "stage3_param_persistence_threshold": max(
            (p.numel() for p in parameters if p.dim() < 2), default=0
        ),
    }
    if is_offloaded:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no use without its optimizer
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        **({half: {"enabled": True}} if half else {}),
    }
