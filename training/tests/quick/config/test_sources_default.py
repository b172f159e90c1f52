"""A start that names no config file: which one is taken, and where its data and results are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_trainer import cli
from lora_trainer.config import default_file, paths
from lora_trainer.config.default_file import find_config
from lora_trainer.config.settings import resolve
from support.config import SPECIFIED
from support.resolving import write


def test_config_of_the_current_folder_goes_before_the_one_beside_the_script(folder):
    shipped = Path(__file__).parents[3] / "config.json"
    assert find_config({}) == (shipped, "the default job's")
    own = write(folder, {"lora_r": 3})
    assert find_config({}) == (own, "the current folder's")
    named = {"LORA_TRAINER_CONFIG": "/else/where.json"}
    assert find_config(named) == (Path("/else/where.json"), "LORA_TRAINER_CONFIG")


def test_without_any_config_file_the_defaults_are_taken(folder, monkeypatch):
    monkeypatch.setattr(default_file, "BESIDE", folder / "config.json")
    assert find_config({}) == (None, "")


@pytest.mark.parametrize("command", [["train"], ["check", "--quick"]], ids=" ".join)
def test_commands_report_which_config_they_take(folder, command, capsys):
    own = write(folder, {"lora_r": 0})
    assert cli.main(command) == 78
    printed = capsys.readouterr()
    assert f"config: {own} (the current folder's)" in printed.out
    assert f"{own}:1" in printed.err


@pytest.mark.parametrize("flags", [["--log_format", "json"], ["--log_format=json"], ["--quiet"]])
def test_a_refused_start_prints_nothing_that_a_script_would_read(folder, flags, capsys):
    write(folder, {"lora_r": 0})
    assert cli.main(["train", *flags]) == 78
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", SPECIFIED, ids=["low memory", "fast"])
def test_config_without_data_and_output_uses_the_public_folders(folder, content, monkeypatch):
    public = folder / "public"
    (public / "outputs").mkdir(parents=True)
    (public / "datasets/demo").mkdir(parents=True)
    (public / "datasets/demo/train.jsonl").write_text("")
    monkeypatch.setattr(paths, "PUBLIC", public)
    config = resolve(write(folder, json.dumps(content)), {}, []).config
    assert config.output.output_dir == str(public / "outputs")
    assert config.data.dataset == str(public / "datasets/demo/train.jsonl")


def test_folders_that_are_given_go_before_the_public_ones(folder, monkeypatch):
    public = folder / "public"
    (public / "outputs").mkdir(parents=True)
    (public / "datasets").mkdir()
    (public / "datasets/a.jsonl").write_text("")
    (folder / "own").mkdir()
    monkeypatch.setattr(paths, "PUBLIC", public)
    config = resolve(None, {"DATASETS_DIR": "own"}, ["--dataset", "a.jsonl"]).config
    assert config.data.dataset == str(folder / "a.jsonl")
    path = write(folder, {"output_dir": "outputs"})
    assert resolve(path, {}, []).config.output.output_dir == str(folder / "outputs")
