"""Every causal language model of transformers trains as plain transformers + PEFT train it.

On a difference that is meant, write the table and the page with `table.COMMAND`.
"""

from __future__ import annotations

import faulthandler
import os
import time

import pytest
import transformers

from support.architectures.sweep import causal_language_models, sweep, warm_up
from support.architectures.table import COMMAND, PAGE, differences, page, path_of, read
from support.architectures.trial import Outcome


@pytest.mark.timeout(1800)
def test_every_architecture_gets_what_the_table_says():
    warm_up()
    outcomes = sweep(causal_language_models())
    lines = differences(read(path_of()), outcomes)
    assert not lines, f"run {COMMAND} if this is meant:\n" + "\n".join(lines)


def test_no_architecture_is_wrong_and_refusals_have_reasons():
    table = read(path_of())
    assert table, f"no table for transformers {transformers.__version__}: run {COMMAND}"
    wrong = {name for name, one in table.items() if one.result in ("differs", "fails")}
    assert not wrong
    assert all(one.reason for one in table.values() if one.result in ("refused", "not built"))


def test_the_page_shows_the_tables():
    assert PAGE.read_text() == page(), f"run {COMMAND}"


def test_an_architecture_that_hangs_or_dies_costs_itself_only():
    def try_one(name: str) -> Outcome:
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            faulthandler.disable()  # its dump would look like a failure in the log
            os.abort()
        if name == "raises":
            raise ValueError("so")
        return Outcome("packed", left=("gate",))

    outcomes = sweep(["dies", "fine", "hangs", "raises"], seconds=2, try_one=try_one)
    assert outcomes["fine"] == Outcome("packed", left=("gate",))
    assert outcomes["hangs"] == Outcome("fails", "no result after 2 s")
    assert outcomes["dies"] == Outcome("fails", "the process died: -6")
    assert outcomes["raises"].result == "fails"
    assert "ValueError in test_architectures.py:try_one: so" in outcomes["raises"].reason


def test_a_new_architecture_is_a_difference():
    old = {"llama": Outcome("packed"), "mamba": Outcome("padded", "so")}
    new = {"llama": Outcome("packed"), "mamba": Outcome("packed"), "zaya": Outcome("packed")}
    assert [line.split(":")[0] for line in differences(old, new)] == ["mamba", "zaya"]
    assert differences(new, old)[0] == "zaya: gone"
