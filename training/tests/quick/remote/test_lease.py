"""One run for each remote folder, as far as a store without locks allows."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from lora_trainer.errors import BusyError
from lora_trainer.remote import lease
from lora_trainer.remote.folder import RemoteFolder
from lora_trainer.remote.lease import Lease
from support import stores

ADDRESS = "faulty://bucket/run"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    stores.reset(monkeypatch)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "STALE_SECONDS", 2.0)


def leased(folder: Path) -> Lease:
    folder.mkdir(exist_ok=True)
    return Lease(RemoteFolder(ADDRESS), folder)


def content() -> dict[str, object]:
    return json.loads(RemoteFolder(ADDRESS).read(".lock") or b"{}")


def test_second_run_is_refused_while_the_first_renews_its_lock(tmp_path: Path) -> None:
    first, second = leased(tmp_path / "a"), leased(tmp_path / "b")
    first.take()
    with pytest.raises(BusyError, match="another run is using this output folder"):
        second.take()
    first.release()


def test_released_lock_is_taken_at_once(tmp_path: Path) -> None:
    first, second = leased(tmp_path / "a"), leased(tmp_path / "b")
    first.take()
    first.release()
    warnings: list[str] = []
    second.take(warnings.append)
    second.release()
    assert warnings == []


def test_lock_of_a_run_that_was_killed_is_taken_once_it_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.1)
    left = {"identity": "other", "holder": "pid 9 on elsewhere", "beat": 3, "is_released": False}
    RemoteFolder(ADDRESS).write(".lock", json.dumps(left).encode())
    warnings: list[str] = []
    taken = leased(tmp_path / "a")
    taken.take(warnings.append)
    assert content()["identity"] == taken.identity
    assert "pid 9 on elsewhere" in warnings[0]
    taken.release()


def test_own_lock_is_taken_without_waiting_and_known_as_own(tmp_path: Path) -> None:
    first = leased(tmp_path / "a")
    first.take()
    first.remember()
    first._ended.set()  # as a kill: it is not released
    again = leased(tmp_path / "a")
    again.take()
    assert again.was_ours
    again.release()
    other = leased(tmp_path / "b")
    other.take()
    assert not other.was_ours
    other.release()


def test_run_whose_lock_was_taken_over_notices(tmp_path: Path) -> None:
    first = leased(tmp_path / "a")
    first.take()
    noticed = threading.Event()
    RemoteFolder(ADDRESS).write(".lock", json.dumps({"identity": "x", "holder": "pid 2"}).encode())
    for _ in range(500):
        if first.is_lost or noticed.wait(0.01):
            break
    assert first.holder == "pid 2"
    first.release()
    assert content()["identity"] == "x"
