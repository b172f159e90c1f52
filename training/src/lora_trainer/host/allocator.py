"""Have malloc give a tensor's memory back as soon as the tensor is gone.

glibc keeps freed blocks of up to 32 MB for later ones; before 2.38 an aligned block, as a tensor
is, does not fit into the hole that one of its size left (glibc bug 14581). A step on a CPU then
holds up to three times its live bytes. Figures: docs/decisions/0023.
"""

from __future__ import annotations

import ctypes
import os

M_MMAP_THRESHOLD = -3
# From here on a block is mapped on its own; smaller ones are few and short-lived.
MAPPED_FROM_BYTES = 256 << 10
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def return_freed_memory() -> bool:
    """Map large blocks on their own, unless the environment says otherwise; return whether."""
    if any(name in os.environ for name in CHOSEN):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES))
    except (AttributeError, OSError):  # no glibc
        return False
