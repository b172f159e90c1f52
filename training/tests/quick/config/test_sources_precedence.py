"""A later source displaces an earlier one's rival keys; foreign held-out rows are not used."""

from pathlib import Path

import pytest

from lora_trainer.config.settings import resolve
from support.resolving import problems_of, values_of, write

SHIPPED = Path(__file__).parents[3] / "config.json"
EVALUATION = ("eval_dataset", "eval_fraction", "eval_steps", "eval_generate")


def evaluation_of(resolved):
    values = values_of(resolved)
    return tuple(values[key] for key in EVALUATION)


def test_own_data_with_a_held_out_share_takes_the_shipped_config_without_a_word(folder):
    arguments = ["--dataset", "my.jsonl", "--eval_fraction", "0.1", "--run_name", "mine"]
    resolved = resolve(SHIPPED, {}, arguments)
    assert evaluation_of(resolved) == (None, 0.1, 20, True)
    assert resolved.warnings == []


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({}, ["--dataset", "my.jsonl"]),
        ({"LORA_TRAINER_DATASET": "my.jsonl"}, []),
    ],
)
def test_own_data_alone_holds_back_a_tenth_in_place_of_the_demos_rows(folder, environ, arguments):
    resolved = resolve(SHIPPED, environ, arguments)
    assert evaluation_of(resolved) == (None, 0.1, 20, True)
    assert str(resolved.origins["eval_fraction"]).startswith("in place of eval_dataset")
    (note,) = resolved.notes
    assert note.startswith("a tenth of your rows is held out")


def test_own_data_with_no_held_out_share_is_not_evaluated(folder):
    resolved = resolve(SHIPPED, {}, ["--dataset", "my.jsonl", "--eval_fraction", "0"])
    assert evaluation_of(resolved) == (None, 0.0, 0, False)
    assert resolved.notes == resolved.warnings == []


@pytest.mark.parametrize(
    ("environ", "arguments", "remedy"),
    [
        ({}, ["--dataset", "my.jsonl"], "add --eval_fraction 0.1 to"),
        ({}, ["--dataset", "my.jsonl", "--eval_generate"], "or --eval_dataset FILE"),
        ({"LORA_TRAINER_DATASET": "my.jsonl"}, [], "add LORA_TRAINER_EVAL_FRACTION=0.1 to"),
    ],
)
def test_own_data_with_another_files_held_out_rows_is_refused_with_a_remedy(
    folder, environ, arguments, remedy
):
    path = write(folder, {"dataset": "a.jsonl", "eval_dataset": "held-out.jsonl"})
    (problem,) = problems_of(path, environ, arguments)
    assert problem.what == "eval_dataset belongs to another dataset than the one to train on"
    assert "config.json:" in problem.where
    assert remedy in problem.remedy


def test_own_data_with_own_held_out_rows_keeps_the_shipped_evaluation(folder):
    resolved = resolve(SHIPPED, {}, ["--dataset", "a.jsonl", "--eval_dataset", "b.jsonl"])
    assert evaluation_of(resolved) == (str(folder / "b.jsonl"), 0.0, 20, True)
    assert resolved.warnings == []


def test_the_held_out_share_of_a_file_holds_for_own_data(folder):
    path = write(folder, {"dataset": "a.jsonl", "eval_fraction": 0.2, "eval_steps": 5})
    assert evaluation_of(resolve(path, {}, ["--dataset", "b.jsonl"])) == (None, 0.2, 5, False)


@pytest.mark.parametrize(
    ("file", "environ", "arguments", "expected"),
    [
        ({"eval_fraction": 0.1}, {}, ["--eval_dataset", "org/x"], {"eval_fraction": 0.0}),
        ({"eval_dataset": "org/x"}, {}, ["--eval_fraction", "0"], {"eval_dataset": "org/x"}),
        ({"warmup_ratio": 0.1}, {}, ["--warmup_steps", "5"], {"warmup_ratio": 0.03}),
        ({"warmup_steps": 5}, {}, ["--warmup_ratio", "0"], {"warmup_steps": None}),
        (
            {"warmup_steps": 5},
            {"LORA_TRAINER_WARMUP_RATIO": "0.2"},
            ["--warmup_steps", "7"],
            {"warmup_steps": 7, "warmup_ratio": 0.03},
        ),
    ],
)
def test_a_later_source_displaces_the_rival_key(folder, file, environ, arguments, expected):
    values = values_of(resolve(write(folder, file), environ, arguments))
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--eval_dataset", "a.jsonl", "--eval_fraction", "0.1"],
        ["--warmup_steps", "5", "--warmup_ratio", "0.1"],
    ],
)
def test_both_rivals_on_the_command_line_stay_a_problem(folder, arguments):
    (problem,) = problems_of(SHIPPED, {}, arguments)
    assert "are both set" in problem.what
