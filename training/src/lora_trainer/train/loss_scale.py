"""The loss scale of float16, which keeps small gradients from being rounded to zero.

float16 ends at 65,504 and rounds below 6e-8 to zero, where gradients often are. The loss is
multiplied by a scale before the backward pass and the gradients divided by it afterwards,
in float32. Where they overflow the optimizer's step is skipped and the same step repeated at
half the scale, so that no example is left out and no learning rate passes unused; after 2,000
steps without an overflow the scale is doubled.

The figures and the rule are those of torch.amp.GradScaler, compared in a test. Ours is two
numbers in the checkpoint's JSON, works on torch 2.1.2's CPU too, and needs no synchronisation
of its own: the loop reads the gradient norm at every step anyway, after the ranks' sum, so that
all ranks see the same overflow. Scales are powers of two: dividing by one rounds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

INITIAL_SCALE = 2.0**16
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5
GROWTH_INTERVAL_STEPS = 2000
# Below one, the gradients of the loss itself are too large for float16.
LEAST_SCALE = 1.0


@dataclass(frozen=True, slots=True)
class LossScale:
    """A scale, the steps since it last changed, and the optimizer steps skipped so far."""

    value: float = INITIAL_SCALE
    growth_tracker: int = 0
    skipped_steps: int = 0

    @property
    def is_least(self) -> bool:
        """Return whether the scale cannot be lowered any further."""
        return self.value * BACKOFF_FACTOR < LEAST_SCALE

    def after_step(self) -> LossScale:
        """Return the scale after a step whose gradients were finite."""
        steps = self.growth_tracker + 1
        if steps < GROWTH_INTERVAL_STEPS:
            return replace(self, growth_tracker=steps)
        grown = self.value * GROWTH_FACTOR
        value = grown if math.isfinite(grown) else self.value
        return replace(self, value=value, growth_tracker=0)

    def after_overflow(self) -> LossScale:
        """Return the scale at which a step whose gradients were not finite is repeated."""
        return LossScale(self.value * BACKOFF_FACTOR, 0, self.skipped_steps + 1)
