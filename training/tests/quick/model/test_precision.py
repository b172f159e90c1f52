"""Precision is what the device computes fast: units on a GPU, measured on a CPU."""

from __future__ import annotations

import pytest

from lora_trainer.config.schema import ModelSection
from lora_trainer.machine import Gpu, Machine
from lora_trainer.model import precision

CPU = Machine(cores=2, memory_bytes=8 << 30, gpus=())


def chosen(asked: object, machine: Machine = CPU, fp16: object = "auto") -> tuple[str, str]:
    return precision.choose_precision(ModelSection(bf16=asked, fp16=fp16), machine)


def with_gpus(*capabilities: tuple[int, int]) -> Machine:
    gpus = tuple(Gpu(i, "GPU", 24 << 30, one) for i, one in enumerate(capabilities))
    return Machine(2, 8 << 30, gpus)


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
    monkeypatch.setattr(precision, "float16_slowness", fail)
    assert chosen("auto") == ("float32", "")
    assert chosen(False) == ("float32", "")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [([(9, 0)], "bfloat16"), ([(7, 5)], "float16"), ([(8, 0), (7, 0)], "float16")],
)
def test_every_gpu_that_trains_must_have_bfloat16_units(capabilities, expected):
    assert chosen("auto", with_gpus(*capabilities)) == (expected, "")


V100, A100 = with_gpus((7, 0)), with_gpus((8, 0))


@pytest.mark.parametrize(
    ("bf16", "fp16", "machine", "expected"),
    [
        ("auto", True, V100, "float16"),
        ("auto", True, A100, "float16"),
        (False, True, A100, "float16"),
        ("auto", False, V100, "float32"),
        ("auto", False, A100, "bfloat16"),
        # As dtype: float32 asks for it.
        (False, "auto", V100, "float32"),
        (False, "auto", A100, "float32"),
    ],
)
def test_keys_choose_the_precision_of_a_gpu(bf16, fp16, machine, expected):
    assert chosen(bf16, machine, fp16) == (expected, "")


@pytest.mark.parametrize(("fp16", "expected"), [("auto", "float16"), (False, "float32")])
def test_bfloat16_that_a_gpu_lacks_is_replaced_with_a_reason(fp16, expected):
    used, why = chosen(True, V100, fp16)
    assert used == expected
    assert why.startswith(f"{expected} is used: ")


def test_slow_float16_on_a_cpu_gives_way_to_float32_with_a_reason(monkeypatch):
    monkeypatch.setattr(precision, "float16_slowness", lambda: 23.0)
    used, why = chosen("auto", fp16=True)
    assert used == "float32"
    assert "fp16 was requested" in why
    assert "23 times" in why


def test_cpu_that_does_not_know_float16_trains_in_float32_with_a_reason(monkeypatch):
    def product_seconds(kind):
        if kind == "float16":
            raise RuntimeError("addmm_impl_cpu_ not implemented for 'Half'")
        return 1.0

    monkeypatch.setattr(precision, "_product_seconds", product_seconds)
    assert chosen("auto", fp16=True) == (
        "float32",
        "fp16 was requested, but float32 is used: this version of PyTorch does not support "
        "float16 on a CPU",
    )


def test_fast_float16_on_a_cpu_is_used(monkeypatch):
    monkeypatch.setattr(precision, "float16_slowness", lambda: 1.0)
    assert chosen("auto", fp16=True) == ("float16", "")
