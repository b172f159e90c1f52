"""Marks of tests that need what no stack, or not every one, has."""

from __future__ import annotations

import math

import pytest

from lora_trainer.config.schema import Config
from lora_trainer.errors import ConfigError
from lora_trainer.model import precision, zero


def _why_no_deepspeed() -> str:
    try:
        zero.check(Config())
    except ConfigError as error:
        return error.problems[0].why
    return ""


needs_deepspeed = pytest.mark.skipif(bool(_why_no_deepspeed()), reason=_why_no_deepspeed())
needs_float16 = pytest.mark.skipif(
    math.isinf(precision.float16_slowness()),
    reason="this stack's torch does not support float16 on a CPU",
)
