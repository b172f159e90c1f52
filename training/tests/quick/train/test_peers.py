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


def test_silent_processes_are_named_with_their_host_and_end_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(peers, "LOST_SECONDS", 0.2)
    monkeypatch.setattr(peers, "UNWIND_SECONDS", 0)
    monkeypatch.setattr(peers.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(peers.os, "_exit", lambda code: pytest.exit(str(code)))
    said: list[Event] = []
    watched = Peers(SimpleNamespace(emit=said.append, close=lambda: None))  # type: ignore[arg-type]
    watched._launch = Launch(0, 5, 0, 2, "host0", 29500)
    watched._hosts = ["host0", "host0", "host1", "host1", "host2"]
    watched._store = Store({2, 3})
    watched._store.set("start/beat/4", LEFT)  # it has ended well
    watched._key, watched._lock = "start", threading.Lock()
    with pytest.raises(pytest.exit.Exception, match=str(PEER_LOST)):
        watched._watch()
    (failed,) = said
    assert isinstance(failed, Failed)
    assert failed.problems[0]["what"] == "lost rank 2 on host1, rank 3 on host1"
