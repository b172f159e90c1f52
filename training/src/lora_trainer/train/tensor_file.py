"""Write tensors in the safetensors format without a copy of them in memory.

The library first makes bytes of each tensor, then of the whole file. Here the tensors' own memory
goes to the disk and to the hash, and Python's global lock is free meanwhile, so that training goes
on. A test compares the bytes with the library's; it reads these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Data = bytes | memoryview
# Source: the format's description, https://huggingface.co/docs/safetensors
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
HEADER_ALIGNMENT = 8


def serialized(tensors: Mapping[str, Tensor]) -> Iterator[Data]:
    """Yield the content of a safetensors file; tensors are contiguous and in host memory.

    The widest numbers come first, so that each is aligned.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in ordered:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        yield tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data
