"""Commands on runs on an object store: they read one there, or say how to copy it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.cli import main
from lora_trainer.remote.folder import RemoteFolder
from support import stores

ADDRESS = "faulty://bucket/mine"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stores.reset(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run = stores.new_run(tmp_path / "run")
    stores.add_checkpoint(run, 5)
    stores.finish(run)
    folder = RemoteFolder(ADDRESS)
    for path in run.rglob("*"):
        if path.is_file():
            folder.upload(path, path.relative_to(run).as_posix())


def test_run_is_copied_to_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "copy"
    assert main(["fetch", ADDRESS, str(target)]) == 0
    assert (target / "final_model" / "adapter_model.safetensors").read_bytes() == b"weights"
    assert str(target) in capsys.readouterr().out
    assert main(["fetch", ADDRESS, str(target)]) == 78  # nothing is overwritten


def test_finished_run_is_exported_from_its_address(tmp_path: Path) -> None:
    assert main(["export", ADDRESS, str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "command", [("runs", ADDRESS), ("compare", ADDRESS, "other"), ("rm", ADDRESS, "--yes"),
                ("dashboard", ADDRESS)],
    ids=lambda command: command[0],
)  # fmt: skip
def test_commands_on_local_folders_name_the_one_that_copies(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 78
    run = f"{ADDRESS}/RUN" if command[0] == "runs" else ADDRESS
    assert f"lora-trainer fetch {run} FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(("address", "code"), [("outputs/mine", 78), ("faulty://bucket/none", 69)])
def test_what_is_no_run_is_refused(tmp_path: Path, address: str, code: int) -> None:
    assert main(["fetch", address, str(tmp_path / "copy")]) == code
