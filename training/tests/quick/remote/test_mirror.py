"""What a reader of the store finds, at any moment and after any fault."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_trainer.checkpoint_folder import verify
from lora_trainer.errors import AccessError, BusyError, StorageError, TrainerError, UnavailableError
from lora_trainer.remote import mirror, restore
from lora_trainer.remote.folder import RemoteFolder
from support import stores
from support.stores import Mirrored

ADDRESS = "faulty://bucket/run"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    stores.reset(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Mirrored]:
    mirrored = Mirrored(ADDRESS, tmp_path / "local")
    yield mirrored
    stores.FaultyStore.fault = staticmethod(lambda *_: None)
    mirrored.end()


def test_manifest_of_a_checkpoint_is_written_after_all_its_files(run: Mirrored) -> None:
    stores.add_checkpoint(run.local, 5)
    run.mirror.flush(10)
    names = [name for name in stores.written(ADDRESS) if name.startswith("checkpoints/")]
    assert names[-1] == "checkpoints/step-000005/manifest.json"
    assert len(names) == 5


def test_events_up_to_a_checkpoint_are_there_before_its_manifest(run: Mirrored) -> None:
    (run.local / "events.jsonl").write_text("as far as step 5\n")
    stores.add_checkpoint(run.local, 5)
    run.mirror.flush(10)
    names = stores.written(ADDRESS)
    last = len(names) - 1 - names[::-1].index("events.jsonl")
    assert last < names.index("checkpoints/step-000005/manifest.json")
    assert run.folder.read("events.jsonl") == b"as far as step 5\n"


def test_done_is_written_last_of_all(run: Mirrored) -> None:
    stores.add_checkpoint(run.local, 5)
    stores.finish(run.local)
    run.mirror.flush(10)
    assert stores.written(ADDRESS)[-1] == "DONE"
    assert {"final_model/SHA256SUMS", "results.json", "DONE"} <= stores.stored(ADDRESS)


def test_older_checkpoint_is_removed_only_after_the_newer_one_was_read_back(run: Mirrored) -> None:
    for step in (5, 10, 15):
        stores.add_checkpoint(run.local, step)
        run.mirror.flush(10)
    shutil.rmtree(run.local / "checkpoints" / "step-000005")
    run.mirror.flush(10)
    assert not any("step-000005" in name for name in stores.stored(ADDRESS))
    removed = ("remove", "/bucket/run/checkpoints/step-000005/manifest.json")
    operations = stores.FaultyStore.operations
    newest = operations.index(("write", "/bucket/run/checkpoints/step-000015/manifest.json"))
    last_removal = len(operations) - 1 - operations[::-1].index(removed)
    assert newest < last_removal
    # The manifest goes first: what is left of the others is no checkpoint.
    files = [p for kind, p in operations[newest:] if kind == "remove" and "step-000005" in p]
    assert files[0] == removed[1]


def test_cut_off_upload_is_noticed_and_repeated(run: Mirrored) -> None:
    spoilt = []

    def spoil(operation: str, path: str) -> None:
        # The file that was written before this operation arrived by half, once.
        name = "/bucket/run/checkpoints/step-000005/optimizer.safetensors"
        if name in stores.FaultyStore.store and not spoilt:
            spoilt.append(name)
            whole = stores.FaultyStore.store[name].getvalue()
            stores.FaultyStore.store[name].truncate(len(whole) // 2)

    original = stores.FaultyStore._open

    def opened(self: stores.FaultyStore, path: str, *arguments: object, **options: object):
        spoil("open", path)
        return original(self, path, *arguments, **options)

    stores.FaultyStore._open = opened
    try:
        stores.add_checkpoint(run.local, 5)
        run.mirror.flush(20)
    finally:
        stores.FaultyStore._open = original
    assert spoilt
    other = run.local.parent / "other"
    other.mkdir()
    restore.bring(run.folder, other)
    verify(other / "checkpoints" / "step-000005")


def test_transient_fault_is_retried_until_it_passes(run: Mirrored) -> None:
    left = [OSError(errno.EBUSY, "Please reduce your request rate.") for _ in range(6)]
    stores.FaultyStore.fault = staticmethod(lambda kind, _: left.pop() if left else None)
    stores.add_checkpoint(run.local, 5)
    run.mirror.flush(60)
    assert not left
    assert "checkpoints/step-000005/manifest.json" in stores.stored(ADDRESS)


def test_lasting_fault_is_one_warning_with_the_age_of_the_last_checkpoint(
    run: Mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "QUIET_SECONDS", 0.0)
    stores.add_checkpoint(run.local, 5)
    run.mirror.flush(10)
    run.mirror._next_warning = 0.0
    stores.FaultyStore.fault = staticmethod(
        lambda kind, _: OSError(errno.EBUSY, "Please reduce your request rate.")
    )
    stores.add_checkpoint(run.local, 10)
    warning = next_warning(run)
    assert "Please reduce your request rate" in warning
    assert "The last mirrored checkpoint is of step 5, 0:0" in warning
    assert str(run.local) in warning


def next_warning(run: Mirrored) -> str:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        run.mirror.wake()
        if warning := run.mirror.warning():
            return warning
        time.sleep(0.01)
    raise AssertionError("no warning")


def test_refusal_is_warned_of_once_and_ends_in_exit_code_77(run: Mirrored) -> None:
    stores.FaultyStore.fault = staticmethod(
        lambda kind, _: PermissionError("The provided token has expired.")
    )
    stores.add_checkpoint(run.local, 5)
    assert "token has expired" in next_warning(run)
    time.sleep(0.1)
    assert run.mirror.warning() == ""
    with pytest.raises(AccessError) as caught:
        run.mirror.flush(10)
    assert str(run.local) in caught.value.block()
    assert caught.value.exit_code == 77
    verify(run.local / "checkpoints" / "step-000005")


def test_run_that_another_one_has_taken_over_stops_mirroring_and_ends_in_75(run: Mirrored) -> None:
    run.mirror.flush(10)
    run.lease.holder = "pid 2 on elsewhere"
    assert "pid 2 on elsewhere has taken over" in next_warning(run)
    stores.add_checkpoint(run.local, 5)
    with pytest.raises(BusyError):
        run.mirror.flush(10)
    assert not any("step-" in name for name in stores.stored(ADDRESS))


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.ENOSPC, "no space left"), StorageError),
     (FileNotFoundError("The specified bucket does not exist"), UnavailableError)],
)  # fmt: skip
def test_end_names_what_the_store_refuses(
    run: Mirrored, error: Exception, kind: type[TrainerError]
) -> None:
    stores.FaultyStore.fault = staticmethod(lambda operation, _: error)
    stores.add_checkpoint(run.local, 5)
    with pytest.raises(kind):
        run.mirror.flush(10)


def test_store_that_never_answers_does_not_keep_the_run_from_ending(run: Mirrored) -> None:
    ended = threading.Event()
    stores.FaultyStore.fault = staticmethod(lambda *_: ended.wait(20) and None)
    try:
        with pytest.raises(UnavailableError, match="cannot be reached"):
            run.mirror.flush(0.3)
    finally:
        ended.set()


def test_best_checkpoint_is_mirrored_before_the_newest(tmp_path: Path) -> None:
    local = stores.new_run(tmp_path / "local")
    for step in (5, 10, 15):
        stores.add_checkpoint(local, step, best=5)
    run = Mirrored(ADDRESS, local)
    run.mirror.flush(10)
    run.end()
    names = [name for name in stores.written(ADDRESS) if name.endswith("manifest.json")]
    assert names == [f"checkpoints/step-0000{step}/manifest.json" for step in ("05", "15")]


def test_damaged_local_checkpoint_keeps_no_other_from_the_store(tmp_path: Path) -> None:
    local = stores.new_run(tmp_path / "local")
    for step in (5, 10):
        stores.add_checkpoint(local, step, best=5)
    (local / "checkpoints" / "step-000005" / "rng.safetensors").write_bytes(b"x")
    run = Mirrored(ADDRESS, local)
    run.mirror.flush(10)
    run.end()
    assert "checkpoints/step-000010/manifest.json" in stores.stored(ADDRESS)


def test_done_of_an_earlier_run_goes_before_anything_of_the_next_is_written(tmp_path: Path) -> None:
    RemoteFolder(ADDRESS).write("DONE", b"1")
    run = Mirrored(ADDRESS, tmp_path / "local")
    run.mirror.flush(10)
    run.end()
    operations = [one for one in stores.FaultyStore.operations if not one[1].endswith(".lock")]
    gone = operations.index(("remove", "/bucket/run/DONE"))
    assert gone < operations.index(("write", "/bucket/run/plan.json"))


def test_archived_run_is_beside_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    run = Mirrored(ADDRESS, tmp_path / "local")
    stores.add_checkpoint(run.local, 5)
    stores.finish(run.local)
    run.mirror.flush(10)
    run.end()
    before = stores.stored(ADDRESS) - {".lock"}
    RemoteFolder(ADDRESS).write("other/DONE", b"a named run")
    aside = mirror.archive(RemoteFolder(ADDRESS))
    assert aside == f"{ADDRESS}.1"
    assert stores.stored(aside) == before
    assert stores.stored(ADDRESS) == {".lock", "other/DONE"}
