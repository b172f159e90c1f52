"""Precision is measured: a bf16 config on a CPU that emulates it trains in float32."""

from __future__ import annotations

import pytest

from lora_trainer.config.schema import ModelSection
from lora_trainer.machine import Gpu, Machine
from lora_trainer.model import precision

CPU = Machine(cores=2, memory_bytes=8 << 30, gpus=())


def chosen(asked: object, machine: Machine = CPU) -> tuple[str, str]:
    return precision.choose_precision(ModelSection(bf16=asked), machine)


def test_slow_bfloat16_is_refused_and_said(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_slowness", lambda: 400.0)
    used, why = chosen(True)
    assert used == "float32"
    assert "400 times" in why


def test_fast_bfloat16_is_used(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_slowness", lambda: 0.6)
    assert chosen(True) == ("bfloat16", "")


def test_a_cpu_is_not_measured_when_nobody_asks(monkeypatch):
    def fail():
        raise AssertionError("measured for nothing")

    monkeypatch.setattr(precision, "bfloat16_slowness", fail)
    assert chosen("auto") == ("float32", "")
    assert chosen(False) == ("float32", "")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [([(9, 0)], "bfloat16"), ([(7, 5)], "float32"), ([(8, 0), (7, 0)], "float32")],
)
def test_every_gpu_that_trains_must_have_bfloat16_units(capabilities, expected):
    gpus = tuple(Gpu(i, "GPU", 24 << 30, one) for i, one in enumerate(capabilities))
    assert chosen("auto", Machine(2, 8 << 30, gpus)) == (expected, "")


def test_the_measurement_is_a_positive_ratio():
    assert precision.bfloat16_slowness() > 0
