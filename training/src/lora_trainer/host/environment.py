"""Environment variables that libraries read when they start, and what they are set to here."""

from __future__ import annotations

from collections.abc import MutableMapping

# Progress bars that libraries draw by themselves clutter every log.
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
ALLOCATOR, GENERIC_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
# What CUDA and PyTorch read when they start.
CUDA_ENVIRONMENT = {
    # CUDA would put the fastest GPU first; NVML, by which the plan is made, goes by the bus.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # Without it cuBLAS may add up in another order each time, and every product warns of that.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Rows of many lengths break memory into pieces that no longer fit. torch 2.1 knows this name
    # alone, later versions read it before GENERIC_ALLOCATOR.
    ALLOCATOR: "expandable_segments:True",
    # Triton compiles with gcc and loads the result from its cache folder; the images have no
    # compiler, and no code runs from their /tmp (docs/decisions/0020). In torch 2.13 an outer
    # product by bmm would be such a kernel, and some models' generation calls torch.compile.
    "TORCH_DISABLE_NATIVE_JIT": "1",
    "TORCH_COMPILE_DISABLE": "1",
}


def set_defaults(environ: MutableMapping[str, str]) -> None:
    """Set what libraries read where the user does not; the worker inherits it."""
    for name, value in (QUIET | CUDA_ENVIRONMENT).items():
        if name != ALLOCATOR or GENERIC_ALLOCATOR not in environ:
            environ.setdefault(name, value)
