"""Rows are named by file and line again, long after they were tokenized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_trainer.data.fingerprint import example_hash
from lora_trainer.data.formats import to_example
from lora_trainer.data.positions import find_rows
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.errors import DataError


def row(text: str) -> dict[str, str]:
    return {"prompt": text, "completion": f"{text}!"}


def hash_of(text: str) -> int:
    return example_hash(to_example(row(text), "completion", {}))


def test_every_line_that_says_the_same_is_found(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join([json.dumps(row("x")), "", "no json", json.dumps(row("y"))]))
    second.write_text("\n".join(json.dumps(row(text)) for text in "yyz"))
    specs = [SourceSpec(path_or_id=str(path)) for path in (first, second)]
    positions = find_rows(specs, {hash_of("y"), hash_of("z"), hash_of("gone")})
    assert positions == {
        hash_of("y"): [f"{first}:4", f"{second}:1", f"{second}:2"],
        hash_of("z"): [f"{second}:3"],
    }


def test_source_that_has_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        find_rows([SourceSpec(path_or_id=str(tmp_path / "gone.jsonl"))], {1})
