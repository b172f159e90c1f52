"""Datasets and runs on an object store, as the commands read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_trainer.data.read import iter_rows
from lora_trainer.data.resolve import SourceSpec, locate
from lora_trainer.errors import ConfigError, UnavailableError
from lora_trainer.remote import folder as remote_folder
from lora_trainer.remote.copies import copy_of_run
from lora_trainer.remote.folder import RemoteFolder, check
from support import stores

ADDRESS = "faulty://bucket/data"
ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stores.reset(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_folder, "FIRST_PAUSE_SECONDS", 0.001)


def test_file_at_an_address_is_read_and_shown_by_its_address() -> None:
    RemoteFolder(ADDRESS).write("rows.jsonl", ROW)
    (file,) = locate(SourceSpec(f"{ADDRESS}/rows.jsonl")) or ()
    assert file.shown == f"{ADDRESS}/rows.jsonl"
    (row,) = iter_rows(SourceSpec(f"{ADDRESS}/rows.jsonl"))
    assert f"{ADDRESS}/rows.jsonl" in str(row)


def test_folder_at_an_address_has_its_splits_and_data_files_only() -> None:
    folder = RemoteFolder(ADDRESS)
    for name in ("train.jsonl", "test.jsonl", "weights.bin"):
        folder.write(name, ROW)
    (file,) = locate(SourceSpec(ADDRESS)) or ()
    assert file.shown == f"{ADDRESS}/train.jsonl"
    assert not list(file.path.parent.glob("*.bin"))


def test_unchanged_file_is_downloaded_once_and_a_changed_one_again() -> None:
    folder, spec = RemoteFolder(ADDRESS), SourceSpec(f"{ADDRESS}/rows.jsonl")
    folder.write("rows.jsonl", ROW)
    first = locate(spec)
    assert locate(spec) == first
    folder.write("rows.jsonl", ROW * 2)
    assert len(list(iter_rows(spec))) == 2


def test_missing_dataset_is_named() -> None:
    with pytest.raises(UnavailableError) as caught:
        locate(SourceSpec(f"{ADDRESS}/none.jsonl"))
    assert f"{ADDRESS}/none.jsonl" in caught.value.block()


def test_run_at_an_address_is_copied_and_verified(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.finish(run)
    folder = RemoteFolder("faulty://bucket/run")
    for path in run.rglob("*"):
        if path.is_file():
            folder.upload(path, path.relative_to(run).as_posix())
    for named in ("faulty://bucket/run", "faulty:/bucket/run/final_model"):
        copy = Path(copy_of_run(named))
        assert next(copy.rglob("adapter_model.safetensors")).read_bytes() == b"weights"
    folder.write("final_model/adapter_model.safetensors", b"others")
    with pytest.raises(UnavailableError, match="does not verify"):
        copy_of_run("faulty://bucket/run")


def test_address_without_a_run_and_names_of_folders() -> None:
    with pytest.raises(UnavailableError, match="there is no run at this address"):
        copy_of_run("faulty://bucket/none")
    assert copy_of_run("outputs/mine") == "outputs/mine"


def test_protocol_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere:// is an unknown protocol"):
        check("nowhere://bucket")


def test_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check("gs://bucket/run")  # no stack has gcsfs
    assert "gcsfs is not installed" in caught.value.block()
    assert "-m pip install gcsfs==" in caught.value.block()


@pytest.mark.parametrize(
    ("error", "code"),
    [(PermissionError("Access Denied"), 77), (OSError(28, "full"), 74),
     (FileNotFoundError("no such bucket"), 69), (OSError(5, "503"), 69)],
)  # fmt: skip
def test_store_that_cannot_be_written_is_refused_before_training(error: OSError, code: int) -> None:
    stores.FaultyStore.fault = staticmethod(lambda kind, _: error if kind == "write" else None)
    with pytest.raises(Exception) as caught:
        check("faulty://bucket/run")
    assert caught.value.exit_code == code  # type: ignore[attr-defined]


def test_store_that_works_is_left_as_it_was() -> None:
    left = [OSError(5, "503")]
    stores.FaultyStore.fault = staticmethod(lambda *_: left.pop() if left else None)
    check("faulty://bucket/run")
    assert stores.stored("faulty://bucket/run") == set()
