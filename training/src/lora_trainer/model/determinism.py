"""Deterministic algorithms, so that a resumed run has the same bytes on a GPU, too.

In its warn-only mode, PyTorch leaves the backward pass of flash attention nondeterministic. So the
strict mode is tried first, on a real forward and backward pass of the loaded model; an operation
without a deterministic implementation fails there and is named in the plan instead of ending the
run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

_OPERATION = re.compile(r"^([\w.:<>()]+) does not have a deterministic implementation")


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
    return ""


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
