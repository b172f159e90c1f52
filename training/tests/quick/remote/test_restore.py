"""A run brought from the store is whole, or what is damaged is skipped by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_trainer.checkpoint_folder import CorruptCheckpointError, verify
from lora_trainer.host.addresses import is_address, local_name, unfolded
from lora_trainer.remote import checkpoints, restore
from lora_trainer.remote.folder import RemoteFolder
from lora_trainer.run.events import CheckpointSaved
from lora_trainer.run.recording import EventFile
from support import stores

ADDRESS = "faulty://bucket/run"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    stores.reset(monkeypatch)


def upload(run: Path, *, without: str = "") -> RemoteFolder:
    folder = RemoteFolder(ADDRESS)
    for path in run.rglob("*"):
        if path.is_file() and path.name != without:
            folder.upload(path, path.relative_to(run).as_posix())
    return folder


def test_newest_checkpoint_and_the_best_by_then_are_brought(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    for step in (5, 10, 15):
        stores.add_checkpoint(run, step, best=5)
    local = tmp_path / "empty"
    local.mkdir()
    assert restore.bring(upload(run), local) == []
    names = sorted(path.name for path in (local / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000015"]
    for name in names:
        verify(local / "checkpoints" / name)


def test_damaged_checkpoint_is_skipped_by_name(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.add_checkpoint(run, 5)
    damaged = stores.add_checkpoint(run, 10)
    (damaged / "optimizer.safetensors").write_bytes(b"x" * 40)
    local = tmp_path / "empty"
    local.mkdir()
    (note,) = restore.bring(upload(run), local)
    assert "step-000010" in note
    assert [path.name for path in (local / "checkpoints").iterdir()] == ["step-000005"]


def test_checkpoint_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.add_checkpoint(run, 5)
    local = tmp_path / "empty"
    local.mkdir()
    assert restore.bring(upload(run, without="manifest.json"), local) == []
    assert not (local / "checkpoints").exists()


def test_checkpoint_that_the_listing_does_not_show_yet_is_brought_by_its_event(
    tmp_path: Path,
) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.add_checkpoint(run, 5)
    with EventFile(run / "events.jsonl") as events:
        events.append(CheckpointSaved(step=5, path="", bytes=1, seconds=1.0, is_best=False))
    folder = upload(run)
    folder.listed = lambda under="": {}  # type: ignore[method-assign]
    local = tmp_path / "empty"
    local.mkdir()
    restore.bring(folder, local)
    verify(local / "checkpoints" / "step-000005")


def test_final_model_that_does_not_match_its_sums_is_refused(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.finish(run)
    folder = upload(run)
    folder.write("final_model/adapter_model.safetensors", b"others")
    local = tmp_path / "empty"
    local.mkdir()
    with pytest.raises(CorruptCheckpointError, match="SHA256SUMS"):
        restore.bring(folder, local)
    assert not (local / "DONE").exists()


def test_names_in_the_store_lead_nowhere_outside_the_run(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.finish(run)
    folder = upload(run)
    folder.write("evil", b"x")
    sums = folder.read("final_model/SHA256SUMS") or b""
    folder.write("final_model/SHA256SUMS", sums + b"0" * 64 + b"  ../../evil\n")
    local = tmp_path / "empty"
    local.mkdir()
    restore.bring(folder, local)
    assert not (tmp_path / "evil").exists()


def test_local_run_that_the_store_has_got_further_with_is_subsumed(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.add_checkpoint(run, 5)
    folder = upload(run)
    assert restore.is_subsumed(folder, run)
    stores.add_checkpoint(run, 10)
    assert not restore.is_subsumed(folder, run)
    shutil.rmtree(run / "checkpoints" / "step-000010")
    (run / "config.digest").write_text("another run\n")
    assert not restore.is_subsumed(folder, run)


def test_interrupted_download_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = stores.new_run(tmp_path / "run")
    stores.add_checkpoint(run, 5)
    folder = upload(run)
    stores.FaultyStore.fault = staticmethod(
        lambda kind, path: OSError("cut off") if path.endswith("rng.safetensors") else None
    )
    with pytest.raises(OSError, match="cut off"):
        checkpoints.download(folder, 5, tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://bucket/run", True), ("gs://bucket", True), ("memory://x", True), ("az://c/x", True),
     ("outputs", False), ("/srv/s3:/x", False), ("hf://datasets/x", False), ("s3:bucket", False),
     ("https://host/x", False), ("C:\\x", False)],
)  # fmt: skip
def test_addresses_are_told_from_paths(text: str, expected: bool) -> None:
    assert is_address(text) is expected


def test_path_that_was_an_address_is_one_again() -> None:
    assert unfolded(str(Path("s3://bucket/run"))) == "s3://bucket/run"
    assert unfolded("/srv/runs") == "/srv/runs"


def test_local_folders_of_two_addresses_differ() -> None:
    assert local_name("s3://a/run") != local_name("s3://b/run")
    assert local_name("s3://a/run") == local_name("s3://a/run/")
    assert local_name("s3://a/run").startswith("run-")
