"""Compare LoRA projections by PEFT's operations and by the fused function: CPU time of a step.

Run it with `OMP_NUM_THREADS=1 training/.venv/bin/python training/bench/fused_lora.py`.
The seven projections of a layer of SmolLM2-135M's widths, forward and backward. Both are timed
alternately, so that other work on the machine affects both equally. Measured on one core that other
work shared (load over 15), 12 rounds of 512 tokens at rank 16: median 214.8 ms against 196.7 ms,
least 186.8 ms against 173.6 ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lora_trainer.model.fused import _FusedLora

WIDTHS = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
SCALING = 2.0


class Projection:
    """A frozen matrix with an adapter, computed either way."""

    def __init__(self, width: int, output: int, rank: int) -> None:
        self.base = nn.Linear(width, output, bias=False).requires_grad_(False)
        self.a, self.b = (
            nn.Linear(*sides, bias=False) for sides in ((width, rank), (rank, output))
        )

    def plain(self, x: Tensor) -> Tensor:
        """Compute it as PEFT does, operation by operation."""
        return self.base(x) + self.b(self.a(x)) * SCALING

    def fused(self, x: Tensor) -> Tensor:
        """Compute it by the fused function."""
        return _FusedLora.apply(x, self.base.weight, None, self.a.weight, self.b.weight, SCALING)


def seconds_of_step(ways: list[Callable[[Tensor], Tensor]], inputs: dict[int, Tensor]) -> float:
    start = time.process_time()
    for way, (width, _) in zip(ways, WIDTHS, strict=True):
        way(inputs[width]).sum().backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.manual_seed(0)
    projections = [Projection(width, output, given.rank) for width, output in WIDTHS]
    inputs = {w: torch.randn(1, given.tokens, w, requires_grad=True) for w in (576, 1536)}
    found: dict[str, list[float]] = {"plain": [], "fused": []}
    for number in range(given.rounds + 2):
        for name, seconds in found.items():
            took = seconds_of_step([getattr(p, name) for p in projections], inputs)
            if number >= 2:  # warm-up
                seconds.append(took)
    for name, seconds in found.items():
        median, least = 1e3 * statistics.median(seconds), 1e3 * min(seconds)
        print(f"{name:<6} median {median:.1f} ms, least {least:.1f} ms")
    ratio = statistics.median(found["plain"]) / statistics.median(found["fused"])
    print(f"gain of the medians: {ratio - 1:+.1%}")


if __name__ == "__main__":
    main()
