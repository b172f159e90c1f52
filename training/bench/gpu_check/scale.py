"""How large each check is: on a GPU, and with `--quick` on any CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama model's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    is_tied: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """The device and the sizes of one run of the check. Units: tokens, unless named."""

    device: str
    small: Shape
    large: Shape
    sharded: Shape
    shard_bytes: int
    attention_tokens: int
    attention_width: int  # of a head
    segments: tuple[int, ...]
    matrix_side: int
    lora_tokens: tuple[int, ...]
    qlora_tokens: tuple[int, ...]
    max_new_tokens: int
    patience: int  # times the sections' limits

    @property
    def has_gpu(self) -> bool:
        """Return whether the checks that need CUDA run."""
        return self.device == "cuda"


# SmolLM2-135M's and Llama 3.1 8B's sizes.
SMALL = Shape(576, 1536, 30, 9, 3, 49_152, is_tied=True)
LARGE = Shape(4096, 14_336, 32, 32, 8, 128_256, is_tied=False)
ONE_BILLION = Shape(2048, 5632, 16, 32, 8, 32_000, is_tied=False)
TINY = Shape(32, 64, 2, 4, 2, 512, is_tied=True)
TINY_UNTIED = Shape(64, 128, 2, 4, 2, 512, is_tied=False)

FULL = Scale(
    device="cuda",
    small=SMALL,
    large=LARGE,
    sharded=ONE_BILLION,
    shard_bytes=256 << 20,
    attention_tokens=8192,
    attention_width=128,
    segments=(4, 16, 64),
    matrix_side=8192,
    lora_tokens=(4096,),
    qlora_tokens=(400, 8192),
    max_new_tokens=32,
    patience=1,
)
QUICK = Scale(
    device="cpu",
    small=TINY,
    large=TINY_UNTIED,
    sharded=TINY_UNTIED,
    shard_bytes=100 << 10,
    attention_tokens=128,
    attention_width=16,
    segments=(4, 16, 64),
    matrix_side=64,
    lora_tokens=(64,),
    qlora_tokens=(16, 64),
    max_new_tokens=4,
    patience=5,
)
