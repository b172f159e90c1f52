"""Environment variables that libraries read at import, and our values for them."""

from __future__ import annotations

from collections.abc import MutableMapping

# Progress bars of libraries clutter every log.
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
# The folder in which the processes of a node leave their exit codes.
EXIT_CODES = "LORA_TRAINER_EXIT_CODES"
ALLOCATOR, GENERIC_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
# Read by CUDA and PyTorch at start.
CUDA_ENVIRONMENT = {
    # CUDA's default order is fastest first; NVML, which the plan uses, sorts by bus id.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # Without it cuBLAS is not deterministic, and every product warns about it.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Rows of many lengths fragment memory. torch 2.1 only knows this name; later versions read it
    # before GENERIC_ALLOCATOR.
    ALLOCATOR: "expandable_segments:True",
    # Triton compiles with gcc and loads the result from its cache folder; the images have no
    # compiler, and no code runs from their /tmp (docs/decisions/0020). In torch 2.13 an outer
    # product by bmm is a Triton kernel, and generation of some models calls torch.compile.
    "TORCH_DISABLE_NATIVE_JIT": "1",
    "TORCH_COMPILE_DISABLE": "1",
}


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set these variables unless the user has set them; the worker inherits them."""
    for name, value in (QUIET | CUDA_ENVIRONMENT).items():
        if name != ALLOCATOR or GENERIC_ALLOCATOR not in environ:
            environ.setdefault(name, value)
