"""All differences between the supported versions of the libraries, with reasons.

The `cu121` stack, and any on Python 3.10, has transformers 4.50.3, the others 5.x.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import transformers

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name; users can do nothing.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
# Nor is there anything to do about optional kernels from a hub, or a machine without a GPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

MAJOR = int(transformers.__version__.split(".")[0])


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """Return `from_pretrained`'s argument for the weights' type: renamed in transformers 5."""
    return {"dtype" if MAJOR >= 5 else "torch_dtype": dtype}


def placement(device: str, *, has_own_code: bool) -> dict[str, Any]:
    """Return `from_pretrained`'s arguments to bring each weight straight to the device.

    Without them, the whole model is converted in the host's memory first. transformers 4 then
    builds the model on the meta device, as 5 always does, and not every class from a model's
    own repository can be built there.
    """
    if has_own_code and MAJOR < 5:
        return {}
    return {"low_cpu_mem_usage": True} if device == "cpu" else {"device_map": {"": device}}


def enable_checkpointing(model: Any, *, lets_go: bool = False) -> None:
    """Recompute activations in the backward pass: the method was renamed in transformers 5.

    `lets_go` of weights after each use: then what was saved cannot be compared with what is
    recomputed, among which empty weights would be found.
    """
    how: dict[str, Any] = {"use_reentrant": False}
    if lets_go:
        how["determinism_check"] = "none"
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    # Frozen embeddings give no gradient that the first block's recomputation could start from.
    model.enable_input_require_grads()


def decoder(model: Any) -> Any:
    """Return what is below the head; not every class has the attribute that it names.

    Gemma 3 has not in transformers 4.50, Llama 4 has not in 5: it is the child with the embeddings.
    """
    below = getattr(model, model.base_model_prefix, None)
    if below is not None:
        return below
    embeddings = model.get_input_embeddings()
    holders = [one for one in model.children() if any(m is embeddings for m in one.modules())]
    return holders[0] if len(holders) == 1 and holders[0] is not embeddings else None
