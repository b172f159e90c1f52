"""Paths of odd names: refused with a command that renames them, shown on one line."""

import os
import shlex
import subprocess

import pytest

from lora_trainer.cli import main
from lora_trainer.errors import DataError
from lora_trainer.host.quoting import shell_word
from support.resolving import from_arguments, problems_of

LATIN = os.fsdecode(b"tr\xe4in.jsonl")
PATHS = [
    "dataset",
    "eval_dataset",
    "output_dir",
    "model_name_or_path",
    "chat_template",
    "dataset_cache_dir",
    "model_cache_dir",
]


@pytest.mark.parametrize("leaf", PATHS)
def test_a_path_that_is_not_utf8_is_refused_by_name_and_the_remedy_renames_it(leaf, tmp_path):
    (tmp_path / LATIN).write_text('{"prompt": "a", "completion": "b"}\n')
    problem = problems_of(None, {}, [f"--{leaf}", str(tmp_path / LATIN)])[0]
    assert problem.what == f"{leaf} is not valid UTF-8: {tmp_path}/tr\\xe4in.jsonl"
    subprocess.run(["bash", "-c", problem.remedy], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["träin.jsonl"]


def test_a_dataset_in_a_list_is_refused_by_name_too(tmp_path):
    entries = f'[{{"path": "{tmp_path}/tr\\udce4in.jsonl"}}]'
    problem = problems_of(None, {}, ["--dataset", entries])[0]
    assert problem.what == f"dataset is not valid UTF-8: {tmp_path}/tr\\xe4in.jsonl"


def test_a_current_folder_that_is_not_utf8_is_one_problem(tmp_path, monkeypatch):
    folder = tmp_path / LATIN
    (folder / "deeper").mkdir(parents=True)
    monkeypatch.chdir(folder / "deeper")
    (problem,) = problems_of(None, {}, ["--dataset", "./a.jsonl", "--output_dir", "out"])
    assert problem.where == f"{tmp_path}/tr\\xe4in.jsonl"
    renamed = shlex.quote(str(tmp_path / "träin.jsonl"))
    assert problem.remedy == f"mv -- $'{tmp_path}/tr\\xe4in.jsonl' {renamed}"


def test_a_path_that_is_not_utf8_ends_the_command_with_78(tmp_path, capsys):
    (tmp_path / LATIN).write_text("{}\n")
    assert main(["check", "--quick", "--dataset", str(tmp_path / LATIN)]) == 78
    assert "tr\\xe4in.jsonl" in capsys.readouterr().err


def test_a_line_break_in_a_name_is_shown_escaped(tmp_path):
    path = tmp_path / "two\nlines\x1b[2J.jsonl"
    path.write_text("{}\n")
    assert from_arguments("--dataset", str(path)).config.data.dataset == str(path)
    block = DataError.of("broken", where=str(path), remedy=f"rm {shell_word(path)}").block()
    assert "two\\nlines\\x1b[2J.jsonl" in block
    assert len(block.splitlines()) == 4
    command = block.splitlines()[2].removeprefix("  remedy: ")
    subprocess.run(["bash", "-c", command], check=True)
    assert not path.exists()
