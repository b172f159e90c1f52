"""`lora-trainer clean` removes what can be made again, and nothing else."""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from pathlib import Path

import pytest

from lora_trainer import cli
from lora_trainer.commands import clean
from lora_trainer.data.fingerprint import MEMORY_NAME
from lora_trainer.host.scratch import LOCK
from lora_trainer.model import embedded

pytestmark = pytest.mark.any_stack
KEY = "0123456789abcdef" * 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one entry of each kind, beside things of others."""
    cache = tmp_path / "home" / "lora-trainer"
    for name in (f"{embedded.PREPARED}-1-2", "venv-cu121", "mine"):
        (cache / name).mkdir(parents=True)
    (cache / f"{embedded.PREPARED}-1-2" / "model.safetensors").write_bytes(b"0" * 2_000_000)
    for name in (KEY, "mine", f"{KEY}.tmp-a"):
        (cache / "datasets" / name).mkdir(parents=True)
        (cache / "datasets" / name / "ids.bin").write_bytes(b"0" * 5000)
    (cache / "datasets" / f"{KEY}.tmp-a" / LOCK).touch()
    (cache / "datasets" / "tokenizers" / KEY[:16]).mkdir(parents=True)
    (cache / MEMORY_NAME).write_text("{}")
    left = tmp_path / "tmp" / "lora-trainer-killed"
    left.mkdir(parents=True)
    (left / LOCK).touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(clean, "CONTAINER_CACHE", tmp_path / "absent")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return cache


def below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_clean_removes_caches_and_leaves_what_it_did_not_make(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["clean"]) == 0
    others = {"venv-cu121", "mine", "datasets", "datasets/mine", "datasets/mine/ids.bin"}
    assert below(cache) == others | {"datasets/tokenizers"}
    assert not list((cache.parents[1] / "tmp").iterdir())
    assert capsys.readouterr().out.splitlines()[-1] == "2 MB freed"


def test_a_dry_run_lists_what_would_be_removed(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = below(cache)
    assert cli.main(["clean", "--dry-run"]) == 0
    assert below(cache) == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("(")[2] for line in lines[:-1]] == [
        "prepared base model)", "tokenized rows)", "tokenizer)", "hashes of files)",
        "unfinished entry)", "temporary folder of a process that ended)",
    ]  # fmt: skip
    assert lines[-1] == "2 MB would be freed"


def test_rows_that_a_run_has_mapped_stay(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = cache / "datasets" / KEY / "ids.bin"
    with rows.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert cli.main(["clean"]) == 0
    assert rows.exists()
    assert re.search(rf"^in use +\d+ kB  {rows.parent}  ", capsys.readouterr().out, re.M)


def test_a_folder_that_is_named_for_rows_is_cleaned_too(cache: Path, tmp_path: Path) -> None:
    for name in (KEY, "mine"):
        (tmp_path / "rows" / name).mkdir(parents=True)
    assert cli.main(["clean", "--dataset_cache_dir", str(tmp_path / "rows")]) == 0
    assert below(tmp_path / "rows") == {"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove everything")
def test_what_may_not_be_removed_is_named(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "datasets").chmod(0o555)
    assert cli.main(["clean"]) == 77
    (cache / "datasets").chmod(0o755)
    assert str(cache / "datasets" / KEY) in capsys.readouterr().err
