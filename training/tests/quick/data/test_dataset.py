"""A run's data: what tells it from another's, and what is said of its rows."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from lora_trainer.config.schema import Config
from lora_trainer.data.examples import Change
from lora_trainer.data.read import iter_rows
from lora_trainer.errors import DataError
from lora_trainer.train.datasets import data_digest, data_warnings, rows_to_train, source_specs


def splits(**changes):
    train = SimpleNamespace(digest="t", sources=np.zeros(4, dtype=np.uint16))
    held_out = SimpleNamespace(digest="e")
    known = {
        "train": train,
        "eval": held_out,
        "train_rows": np.arange(4),
        "eval_rows": np.arange(2),
        "warnings": (),
        "train_report": None,
        "eval_report": None,
    }
    return SimpleNamespace(**(known | changes))


CHANGES = {
    "rows": {"train": SimpleNamespace(digest="u", sources=np.zeros(4, dtype=np.uint16))},
    "sources": {"train": SimpleNamespace(digest="t", sources=np.ones(4, dtype=np.uint16))},
    "choice of rows": {"train_rows": np.arange(3)},
    "held-out rows": {"eval_rows": np.arange(1)},
    "held-out data": {"eval": SimpleNamespace(digest="f")},
    "no held-out data": {"eval": None},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_is_another_run(change):
    assert data_digest(splits(**CHANGES[change]), [1.0]) != data_digest(splits(), [1.0])


def test_another_weight_is_another_run():
    assert data_digest(splits(), [1.0]) != data_digest(splits(), [3.0])


def test_rows_that_are_cut_left_out_or_skipped_are_said():
    report = SimpleNamespace(
        rows_read=9,
        rows_truncated=2,
        longest_tokens=4000,
        rows_dropped={"too long": 3},
        rows_skipped={"invalid JSON": 1},
        rows_used=3,
        processes_restarted=1,
        rows_changed={Change.THOUGHTS_DROPPED.value: 2, Change.SYSTEM_ADDED.value: 3},
    )
    warnings = data_warnings(Config(), splits(train_report=report))
    assert len(warnings) == 5
    assert warnings[0] == "dataset: 1 tokenizing process died; the rows were processed again"
    assert "2 of 3 rows: the chat template drops the reasoning" in warnings[-1]
    assert "train_on to last" in warnings[-1]
    for text in (
        "2 of 9 rows are truncated to max_seq_length 2048 (--max_seq_length 4000 keeps",
        "3 rows left out: too long",
        "1 rows skipped: invalid",
    ):
        assert any(text in line for line in warnings)


@pytest.mark.parametrize(("limit", "expected"), [(2, "1 of 2 held-out answers"), (3, ""), (4, "")])
def test_answers_that_cannot_match_in_so_many_tokens_are_said(limit, expected):
    # The last trained tokens are the answer, and the last of them ends it: here 1 and 3 are text.
    masks = ([0, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    rows = [(np.zeros(len(mask)), np.array(mask)) for mask in masks]
    config = Config(training={"eval_generate": True, "eval_max_new_tokens": limit})
    warning = "".join(data_warnings(config, splits(eval=rows)))
    assert warning.startswith(expected)
    assert ("--eval_max_new_tokens 3 " in warning) is bool(expected)


def test_weights_that_leave_no_row_are_a_data_error():
    with pytest.raises(DataError, match="no row is left"):
        rows_to_train(lambda epoch: np.arange(0))


def test_sources_take_the_sections_defaults_and_their_own_values():
    config = Config.model_validate(
        {
            "data": {
                "dataset": ["a.jsonl", {"path": "b", "weight": 2.0, "format": "alpaca"}],
                "dataset_format": "messages",
                "dataset_columns": {"prompt": "question"},
            }
        }
    )
    first, second = source_specs(config, config.data.dataset)
    assert (first.path_or_id, first.format, first.weight) == ("a.jsonl", "messages", 1.0)
    assert (second.path_or_id, second.format, second.weight) == ("b", "alpaca", 2.0)
    assert source_specs(config, None) == []


def test_a_dataset_to_evaluate_on_may_have_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"tr\xe4in.jsonl")
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    (spec,) = source_specs(Config(), [str(path)])
    assert [row.value for row in iter_rows(spec)] == [{"prompt": "a", "completion": "b"}]
