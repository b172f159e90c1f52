"""What hinders an installation ends with its own exit code, before anything is downloaded."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from lora_trainer.commands import install

pytestmark = pytest.mark.any_stack


def installed(venv: Path) -> int:
    """Install with a Python that must not be needed."""
    return install.main(["--venv", str(venv), "--stack", "cpu", "--python", "/absent"])


def test_a_full_disk_is_seen_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1_024_000_000)
    )
    assert installed(tmp_path / "venv") == 74
    assert "1.0 GB are free, 3.0 GB are needed" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 77), (errno.EROFS, 77), (errno.ENOSPC, 74)]
)
def test_a_folder_that_takes_nothing_ends_with_its_reason(
    number: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert installed(tmp_path / "venv") == code
    printed = capsys.readouterr().err
    assert f"why:    {os.strerror(number)}" in printed
    assert "LORA_VENV=/another/folder/venv run.sh" in printed
