"""What the worker says of its end."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_trainer.config.schema import Config
from lora_trainer.host.launcher import Launch
from lora_trainer.redaction import Redaction
from lora_trainer.run.protocol import EVENTS_FD, WorkerSpec
from lora_trainer.train import worker


@pytest.fixture(autouse=True)
def signals():
    """Put back the handlers that the worker sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stop_after_the_training_tells_the_step_that_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()

    def run(_order: object, _emit: object, stop: worker.StopFlag, *_: object) -> int:
        stop.step = 40
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal raises")

    monkeypatch.setenv(EVENTS_FD, str(writing))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    spec = SimpleNamespace(rank=0, launch=None)
    monkeypatch.setattr(WorkerSpec, "read", staticmethod(lambda _: spec))
    monkeypatch.setattr(worker.faulthandler, "register", lambda *_, **__: None)
    monkeypatch.setattr(worker, "run", run)
    assert worker.main() == 143
    with os.fdopen(reading) as pipe:
        last = json.loads(pipe.read().splitlines()[-1])
    assert (last["event"], last["step"], last["signal"]) == ("stopped", 40, "SIGTERM")


def test_a_spec_reaches_the_worker_as_it_was_written() -> None:
    config = Config.model_validate({"model": {"hf_token": "hf_secret"}})
    launch = Launch(3, 4, 1, 2, "10.0.0.1", 29500, "torchrun", has_agent_store=True)
    spec = WorkerSpec(
        config, Path("out"), "run", 3, 4, launch=launch, redaction=Redaction(["s3cret"])
    )
    received = WorkerSpec.read(spec.to_json())
    assert replace(received, redaction=spec.redaction) == spec
    assert received.redaction.secrets == {"s3cret"}
