"""Random examples on which `probe.verify` compares a model's fast paths with its own forward pass.

Every process draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.prefixes import LEAST_TOKENS
from . import sizes
from .forward import MicroBatch

LENGTHS = (9, 24, 5)
# A sliding window shorter than this is crossed by an example; a longer one costs too much.
LONGEST_WINDOW = 512


def random_examples(model: Any) -> MicroBatch:
    """Return supervised examples of a few lengths."""
    draw = _random_tokens(model)
    return _supervised([draw(length) for length in (*LENGTHS, *_crossing(model))])


def examples_that_begin_alike(model: Any) -> MicroBatch:
    """Return supervised examples of which all but the last begin alike, and two for longer."""
    draw = _random_tokens(model)
    prefix = draw(LEAST_TOKENS)
    longer = np.concatenate([prefix, draw(max(LEAST_TOKENS, *_crossing(model), 0))])
    pairs = [(prefix, draw(5)), (longer, draw(3)), (longer, draw(7))]
    return _supervised([*map(np.concatenate, pairs), draw(6)])


def _crossing(model: Any) -> tuple[int, ...]:
    """Return the length of an example that crosses the model's sliding window, if it has one."""
    window = getattr(sizes.text_config(model.config), "sliding_window", None) or 0
    return (window + 7,) if 0 < window <= LONGEST_WINDOW else ()


def _random_tokens(model: Any) -> Callable[[int], NDArray[np.int64]]:
    """Return what draws as many token ids as it is asked for."""
    random = np.random.Generator(np.random.PCG64(0))
    vocabulary = sizes.vocabulary(model.config)
    return lambda length: random.integers(0, vocabulary, length)


def _supervised(ids: list[NDArray[np.int64]]) -> MicroBatch:
    return MicroBatch(ids, [np.ones(len(one), dtype=bool) for one in ids])
