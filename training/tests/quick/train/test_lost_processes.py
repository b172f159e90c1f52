"""What rank 0 says of processes that have fallen silent; the store here is a dictionary."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from lora_trainer.host.launcher import Launch
from lora_trainer.run.events import Event, Failed
from lora_trainer.run.protocol import PEER_LOST
from lora_trainer.train import peers
from lora_trainer.train.peers import LEFT, Peers


class Store:
    """Counts for the processes that live, each time it is read."""

    def __init__(self, silent: set[int]) -> None:
        self.silent = silent
        self.reads = 0
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.reads += 1
        return [self._value(key).encode() for key in keys]

    def _value(self, key: str) -> str:
        name = key.rpartition("/")[2]
        if not name.isdigit() or int(name) in self.silent:
            return self.values.get(key, "")
        return self.values.get(key) or str(self.reads)


def peers_of(rank: int, store: Store, events: list[Event], *, signal: str = "") -> Peers:
    pipe = SimpleNamespace(emit=events.append, close=lambda: None)
    stop = SimpleNamespace(is_set=lambda: bool(signal))
    peers = Peers(pipe, stop)  # type: ignore[arg-type]
    peers._launch = Launch(rank, 5, 0, 2, "host0", 29500)
    peers._hosts = ["host0", "host0", "host1", "host1", "host2"]
    peers._store, peers._key, peers._lock = store, "start", threading.Lock()
    return peers


def test_silent_processes_are_named_with_their_host_and_end_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(peers, "LOST_SECONDS", 0.2)
    monkeypatch.setattr(peers, "UNWIND_SECONDS", 0)
    monkeypatch.setattr(peers.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(peers.os, "_exit", lambda code: pytest.exit(str(code)))
    events: list[Event] = []
    watched = peers_of(0, Store({2, 3}), events)
    watched._store.set("start/beat/4", LEFT)  # it has ended well
    with pytest.raises(pytest.exit.Exception, match=str(PEER_LOST)):
        watched._watch()
    (failed,) = events
    assert isinstance(failed, Failed)
    assert failed.problems[0]["what"] == "lost rank 2 on host1, rank 3 on host1"


def test_a_supervisor_that_was_killed_is_named_by_rank_0() -> None:
    store, events = Store(set()), list[Event]()
    peers_of(2, store, events)._mark_orphan()
    assert peers_of(1, store, events).have_orphan()
    assert not events
    assert peers_of(0, store, events).have_orphan()
    (failed,) = events
    assert isinstance(failed, Failed)
    assert failed.problems[0]["what"] == "lost rank 2 on host1"


def test_a_supervisor_that_was_killed_after_a_stop_signal_is_no_loss() -> None:
    store = Store(set())
    peers_of(2, store, [], signal="SIGTERM")._mark_orphan()
    assert not peers_of(0, store, []).have_orphan()


def test_processes_end_well_only_after_rank_0_has() -> None:
    store = Store(set())
    store.set("start/beat/0", LEFT)
    assert not peers_of(1, store, []).have_finished()
    assert peers_of(0, store, []).have_finished()
    assert peers_of(1, store, []).have_finished()
