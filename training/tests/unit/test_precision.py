"""Precision is measured: a bf16 config on a CPU that emulates it trains in float32."""

from __future__ import annotations

from lora_trainer.model import precision


def test_slow_bfloat16_is_refused_and_said(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_slowness", lambda: 400.0)
    used, why = precision.choose_precision(True, "cpu")
    assert used == "float32"
    assert "400 times" in why


def test_fast_bfloat16_is_used(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_slowness", lambda: 0.6)
    assert precision.choose_precision(True, "cpu") == ("bfloat16", "")


def test_a_cpu_is_not_measured_when_nobody_asks(monkeypatch):
    def fail():
        raise AssertionError("measured for nothing")

    monkeypatch.setattr(precision, "bfloat16_slowness", fail)
    assert precision.choose_precision("auto", "cpu") == ("float32", "")
    assert precision.choose_precision(False, "cpu") == ("float32", "")


def test_the_measurement_is_a_positive_ratio():
    assert precision.bfloat16_slowness() > 0
