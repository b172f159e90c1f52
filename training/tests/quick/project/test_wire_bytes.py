"""The sizes that bench/wire.py computes with."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from support.checkout import TRAINING

pytestmark = pytest.mark.any_stack


@pytest.fixture(scope="module")
def wire() -> Any:
    spec = importlib.util.spec_from_file_location("wire", TRAINING / "bench" / "wire.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["wire"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize(("shape", "parameters"), [("7b", 39_976_960), ("70b", 207_093_760)])
def test_an_adapter_of_rank_16_has_the_parameters_that_peft_gives_it(
    wire: Any, shape: str, parameters: int
) -> None:
    assert sum(wire.SHAPES[shape].adapter(16)) == parameters


def test_one_process_sends_nothing_and_many_at_most_two_buckets(wire: Any) -> None:
    tensors = wire.LLAMA_2_7B.adapter(16)
    assert wire.sent_bytes(tensors, 1) == 0
    assert wire.sent_bytes(tensors, 2) == wire.bucket_bytes(tensors, 2)
    assert wire.sent_bytes(tensors, 512) < 2 * wire.bucket_bytes(tensors, 512)
