"""Work in progress is removed with its process: by itself, or after a kill by the next start."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from lora_trainer.commands import check
from lora_trainer.config.settings import resolve
from lora_trainer.data.cache import new_entry
from lora_trainer.errors import StorageError
from lora_trainer.host.scratch import LOCK, TEMPORARY, release, remove_temporary, scratch_folder
from lora_trainer.model import embedded, hub
from lora_trainer.report import charts
from support.scratch import making


def test_folder_that_another_program_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lora-trainer-mine").mkdir()
    os.utime(tmp_path / "lora-trainer-mine", (0, 0))
    (tmp_path / "lora-trainer-file").write_text("mine")
    with scratch_folder(tmp_path, TEMPORARY) as folder:
        assert (folder / LOCK).exists()
    assert not folder.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"lora-trainer-mine", "lora-trainer-file"}


def test_a_start_removes_the_temporary_folders_of_dead_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("lora-trainer-0123abc_", "lora-trainer-killed", "lora-trainer-0123abcd")
    for name in (*names, "lora-trainer-notes", "lora-trainer-01234567"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "lora-trainer-killed" / LOCK).touch()
    (tmp_path / "lora-trainer-01234567" / "mine").touch()
    os.utime(tmp_path / "lora-trainer-0123abcd")  # it may get its lock yet
    with scratch_folder(tmp_path, "lora-trainer-") as living:
        remove_temporary()
        stays = {
            living.name,
            "lora-trainer-notes",
            "lora-trainer-01234567",
            "lora-trainer-0123abcd",
        }
        assert {path.name for path in tmp_path.iterdir()} == stays


def test_folder_without_a_lock_goes_after_an_hour_where_the_pattern_is_ours(tmp_path: Path) -> None:
    for name, age in (("old", 7200.0), ("new", 60.0)):
        (tmp_path / f".making-{name}").mkdir()
        os.utime(tmp_path / f".making-{name}", (time.time() - age,) * 2)
    with scratch_folder(tmp_path, ".making-", ".making-*") as folder:
        assert sorted(making(tmp_path)) == sorted([folder, tmp_path / ".making-new"])


def test_released_folder_holds_no_lock_under_its_final_name(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "x-") as folder:
        release(folder)
        folder.rename(tmp_path / "final")
    assert not list((tmp_path / "final").iterdir())


def test_tokenized_rows_of_a_killed_run_go_at_once(tmp_path: Path) -> None:
    killed = tmp_path / "0123.tmp-abc"
    killed.mkdir()
    (killed / LOCK).touch()
    with pytest.raises(KeyboardInterrupt), new_entry(tmp_path, "4567", 9):
        assert not killed.exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_folder_of_fonts_is_removed_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setattr(charts.os, "access", lambda *_: False)
    killed = tmp_path / "lora-trainer-matplotlib-killed"
    killed.mkdir()
    (killed / LOCK).touch()
    with charts._matplotlib_folder():
        assert len(list(tmp_path.iterdir())) == 1
        assert not killed.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault",
    [OSError(28, "No space left on device"), RuntimeError("I/O error: disk full (os error 28)")],
)
def test_full_cache_is_reported_as_the_cache(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise fault

    monkeypatch.setattr(embedded, "_dequantize", refuse)
    with pytest.raises(StorageError, match="to the cache failed") as caught:
        embedded.prepare(tmp_path)
    (problem,) = caught.value.problems
    assert problem.where == f"model_cache_dir: {tmp_path}"
    assert problem.why == "No space left on device"
    assert "--model_cache_dir" in problem.remedy
    assert not list(tmp_path.iterdir())


def test_preflight_finds_the_cache_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(embedded, "free_disk_bytes", lambda _: 300 << 20)
    folders = ["--model_cache_dir", str(cache), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(StorageError) as caught:
        check.preflight(resolve(None, {}, folders))
    (problem,) = caught.value.problems
    assert (problem.where, problem.why) == (
        f"model_cache_dir: {cache}", "315 MB are free, 566 MB are required",
    )  # fmt: skip


def test_full_disk_under_a_download_is_the_hubs_cache() -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as cause:
            raise ValueError("could not fetch it") from cause
    except ValueError as error:
        fault = hub.explained(error, "owner/model", None, is_local=False)
    assert fault.exit_code == 74
    assert "hub" in fault.problems[0].where
    assert "HF_HOME" in fault.problems[0].remedy
