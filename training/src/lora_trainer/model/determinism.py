"""Deterministic algorithms, so that a resumed run has the same bytes on a GPU, too.

In its warn-only mode, PyTorch leaves the backward pass of flash attention nondeterministic. So the
strict mode is tried first, on a real forward and backward pass of the loaded model; an operation
without a deterministic implementation fails there and is named in the plan instead of ending the
run.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import torch

_OPERATION = re.compile(r"^([\w.:<>()]+) does not have a deterministic implementation")

WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
# By itself PyTorch takes at most as much as this, so what it has allocated stays large enough.
LARGEST = ":4096:8"


def require(attempt: Callable[[], None]) -> str:
    """Switch deterministic algorithms on; return why not all of them are, "" if they are.

    `attempt` runs the model forward and backward.
    """
    # Each buffer that a kernel fills anyway would be filled with NaN before.
    filling = getattr(torch.utils, "deterministic", None)
    if filling is not None:  # torch 2.1 does not fill them
        filling.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        attempt()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        named = _OPERATION.search(str(error))
        which = named[1] if named else str(error).splitlines()[0][:120]
        return (
            f"a resumed run may differ in its last digits: {which} has no deterministic "
            "implementation on this device"
        )
    finally:
        _forget_workspaces()
    return ""


def _forget_workspaces() -> None:
    """Take the setting of cuBLAS' workspaces out of the environment, once PyTorch has checked it.

    PyTorch checks it once and allocates the workspaces, but parses it again for each matrix
    product, which takes the host 57 of 78 microseconds (docs/decisions/0025).
    """
    if not torch.cuda.is_initialized() or os.environ.get(WORKSPACES) != LARGEST:
        return
    del os.environ[WORKSPACES]
    try:
        _multiply_on_the_gpu()
    except RuntimeError:  # this release asks for it each time
        os.environ[WORKSPACES] = LARGEST


def _multiply_on_the_gpu() -> None:
    one = torch.ones(8, 8, device="cuda")
    torch.mm(one, one)


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Let operations without a deterministic form pass: generation feeds nothing back."""
    is_on = torch.are_deterministic_algorithms_enabled()
    is_lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=is_lenient)
