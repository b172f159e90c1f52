"""The config file: sections, lines, and every way in which it can be broken."""

import json
import os
from pathlib import Path

import pytest

from lora_trainer.config.file import parse
from lora_trainer.config.settings import resolve
from lora_trainer.errors import AccessError
from support.resolving import from_file, problem_in, problems_in, problems_of, write


def test_flat_and_sectioned_keys_mix(folder):
    resolved = from_file(folder, {"lora_r": 8, "training": {"seed": 7}, "$schema": "s.json"})
    assert (resolved.config.lora.lora_r, resolved.config.training.seed) == (8, 7)


@pytest.mark.parametrize(
    ("text", "rate"), [("1e-4", 1e-4), ("2E-3", 2e-3), (".5", 0.5), ("1", 1.0), ("+1.5e0", 1.5)]
)
def test_yaml_reads_numbers_as_yaml_1_2_does(folder, text, rate):
    resolved = from_file(folder, f"# why\ntraining:\n  learning_rate: {text}\n", "c.yaml")
    assert resolved.config.training.learning_rate == rate
    assert str(resolved.origins["learning_rate"]).endswith("c.yaml:3 /training/learning_rate")


def test_yaml_yes_is_text_and_refused_for_a_switch(folder):
    problem = problem_in(folder, "use_4bit: yes\n", "c.yml")
    assert problem.what == "use_4bit cannot be 'yes' (text)"
    assert problem.remedy == "write true"


@pytest.mark.parametrize("text", ["lora_r: 4\n", "# mine\n---\nlora:\n  lora_r: 4\n"])
def test_yaml_that_a_container_sees_as_config_json_is_read(folder, text):
    assert from_file(folder, text, "config.json").config.lora.lora_r == 4


def test_empty_yaml_and_null_keys_give_the_defaults(folder):
    assert from_file(folder, "# nothing\n", "c.yaml").config == resolve(None, {}, []).config
    resolved = from_file(folder, "lora_r:\nwarmup_steps: null\ndeepspeed:\nlora:\n", "c.yaml")
    assert resolved.origins["lora_r"].kind == "default"
    assert resolved.warnings == []


def test_model_is_a_section_or_a_name(folder):
    assert from_file(folder, {"model": "a/b"}).config.model.model_name_or_path == "a/b"
    resolved = from_file(folder, {"model": {"model_name_or_path": "c/d"}})
    assert resolved.config.model.model_name_or_path == "c/d"


def test_key_in_the_wrong_section_is_told_its_own(folder):
    problem = problem_in(folder, '{"training": {\n"lora_r": 8}}')
    assert problem.what == "lora_r does not belong in training"
    assert problem.where.endswith("config.json:2 /training/lora_r")
    assert "lora" in problem.remedy


def test_unknown_keys_are_told_their_likely_meaning(folder):
    content = {"learning_rat": 1, "trainig": {"seed": 1}, "lora": {"training": {}}}
    problems = problems_in(folder, content | {"num_epoch": 1})
    assert [problem.remedy for problem in problems] == [
        "did you mean learning_rate?",
        "did you mean training?",
        "move it to the top level",
        "did you mean num_train_epochs?",
    ]


def test_comment_key_in_json_points_to_yaml(folder):
    assert "YAML" in problem_in(folder, {"_comment": "x"}).remedy


@pytest.mark.parametrize(
    ("content", "name"),
    [('{"seed": 1,\n "seed": 2}', "c.json"), ("seed: 1\nseed: 2\n", "c.yaml")],
)
def test_key_given_twice_in_a_file_names_both_lines(folder, content, name):
    problem = problem_in(folder, content, name)
    assert problem.where.endswith(f"{name}:2 /seed")
    assert "line 1" in problem.why


@pytest.mark.parametrize(
    "content",
    ['{"lr": 1,\n"learning_rate": 2}', '{"lr": 1,\n"training": {"learning_rate": 2}}'],
)
def test_leaf_given_under_two_names_names_both_places(folder, content):
    problem = problem_in(folder, content)
    assert "learning_rate" in problem.where
    assert "config.json:1 /lr " in problem.why


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('{"seed": 1,}', ":1", "JSON"),
        ('{\n"seed": 1 "x": 2}', ":2", "JSON"),
        ('{"seed": 1} x', ":1", "JSON"),
        ("", ":1", "JSON"),
        ("[1]", ":1", "a list of 1"),
        ('{\n"learning_rate": NaN}', ":2 /learning_rate", "NaN"),
        ('{\n"learning_rate": -Infinity}', ":2 /learning_rate", "Infinity"),
        ('{"learning_rate": 1e999}', ":1 /learning_rate", "1e308"),
        ('{"seed": ' + "9" * 5000 + "}", ":1", "digits"),
        ("[" * 5000 + "]" * 5000, ":1", "nested"),
        ('{"a": ' + "[" * 50 + "]" * 50 + "}", ":1", "nested"),
        ('{"training": 3}', ":1 /training", "section"),
    ],
)
def test_broken_json_is_reported_with_its_line(folder, content, where, what):
    problem = problem_in(folder, content)
    assert problem.where.endswith(f"config.json{where}")
    assert what in problem.what


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("seed: [1\n", 2),
        ("seed: 1\n\tlora_r: 2\n", 2),
        ("seed: 1\n---\nlora_r: 2\n", 3),
        ("a: &x 1\nseed: *x\n", 2),
        ("seed: !!python/object:os.system x\n", 1),
        ("? [a]\n: 1\n", 1),
        ("seed: 1\nrun_name: \x01\n", 2),
        ("learning_rate: .inf\n", 1),
        ("[" * 5000, 1),
    ],
)
def test_broken_yaml_is_reported_with_its_line(folder, content, line):
    problem = problem_in(folder, content, "c.yaml")
    assert f"c.yaml:{line}" in problem.where


def test_lines_of_json_and_yaml_agree(folder):
    text = '{"a": {"b": [1,\n {"c": 2}]},\n\n "d": "\\u00e9", "e": []}'
    as_json, as_yaml = parse(text, Path("c.json")), parse(text, Path("c.yaml"))
    assert as_json.value == as_yaml.value == json.loads(text)
    assert as_json.lines == as_yaml.lines | {(): 1}
    assert as_json.location(("a", "b", 1, "c")) == "c.json:2 /a/b/1/c"


def test_missing_file_names_its_neighbour(folder):
    write(folder, "{}", "config.json")
    problem = problems_of(folder / "confg.json", {}, [])[0]
    assert str(folder / "config.json") in problem.remedy


def test_folder_in_place_of_the_file_is_explained(folder):
    (folder / "config.json").mkdir()
    problem = problems_of(folder / "config.json", {}, [])[0]
    assert "Docker" in problem.why


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_an_access_error(folder):
    path = write(folder, "{}")
    path.chmod(0)
    with pytest.raises(AccessError, match="no permission to read"):
        resolve(path, {}, [])


def test_denied_file_is_an_access_error(folder, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(AccessError, match="no permission to read"):
        resolve(folder / "config.json", {}, [])


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "config.json/x"])
def test_impossible_file_names_are_config_errors(folder, name):
    write(folder, "{}")
    assert problems_of(folder / name, {}, [])


def test_latin_1_and_large_files_are_refused(folder):
    (folder / "latin.json").write_bytes(b'{\n"run_name": "\xe9"}')
    assert problems_of(folder / "latin.json", {}, [])[0].where.endswith("latin.json:2")
    (folder / "large.json").write_bytes(b" " * 300_000)
    assert "KiB" in problems_of(folder / "large.json", {}, [])[0].what


def test_byte_order_mark_is_read_over(folder):
    (folder / "c.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert resolve(folder / "c.json", {}, []).config.training.seed == 3
