"""A layer launches no more operations on a GPU than its recorded budget."""

from __future__ import annotations

import pytest

from lora_trainer.model import quantize
from support import operation_budget
from support.operation_budget import SETTINGS, budgets, count, versions

RECORD = f"python {operation_budget.FILE.with_suffix('.py').name} in tests/support records it"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_runs_exactly_the_operations_of_its_budget(name: str) -> None:
    if SETTINGS[name].use_4bit and not quantize.works_on_cpu():
        pytest.skip("this stack's bitsandbytes does not train on a CPU")
    budget = budgets().get(versions(), {}).get(name)
    assert budget is not None, f"no budget for {versions()}: {RECORD}"
    counted = count(SETTINGS[name])
    risen = {key: (budget[key], n) for key, n in counted.items() if n > budget[key]}
    assert not risen, "more operations a layer than the budget (budget, counted)"
    assert counted == budget, f"fewer operations a layer than the budget: {RECORD}"
