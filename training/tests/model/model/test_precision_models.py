"""What of test_precision.py imports torch."""

from __future__ import annotations

from lora_trainer.model import precision


def test_the_measurement_is_a_positive_ratio():
    assert precision.bfloat16_slowness() > 0
    assert precision.float16_slowness() > 0
