"""Try every causal language model of the installed transformers, each in a process of its own.

A process is forked for each architecture after one import, two at a time, with a time limit:
one that hangs or dies costs itself only.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported here once, instead of in each process
import transformers.modeling_utils  # noqa: F401

from support.architectures.trial import Outcome, attempt

SECONDS = 300.0
PROCESSES = 2


def sweep(
    model_types: Iterable[str],
    *,
    processes: int = PROCESSES,
    seconds: float = SECONDS,
    try_one: Callable[[str], Outcome] = attempt,
    report: Callable[[str, Outcome], None] = lambda *_: None,
) -> dict[str, Outcome]:
    """Return what each architecture gets, by name in the order of the alphabet."""
    waiting = sorted(model_types, reverse=True)
    outcomes: dict[str, Outcome] = {}
    with selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            while waiting and len(selector.get_map()) < processes:
                name = waiting.pop()
                pipe, pid = _start(name, try_one)
                selector.register(pipe, selectors.EVENT_READ, (name, pid, time.monotonic()))
            ready = {key.fd for key, _ in selector.select(timeout=0.5)}
            for key in list(selector.get_map().values()):
                name, pid, begun = key.data
                if key.fd in ready:
                    outcomes[name] = _finish(key.fd, pid)
                elif time.monotonic() - begun > seconds:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    outcomes[name] = Outcome("fails", f"no result after {seconds:.0f} s")
                else:
                    continue
                report(name, outcomes[name])
                selector.unregister(key.fd)
                os.close(key.fd)
    return dict(sorted(outcomes.items()))


def _start(name: str, try_one: Callable[[str], Outcome]) -> tuple[int, int]:
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return reading, pid
    try:
        os.close(reading)
        warnings.simplefilter("ignore")  # pytest makes errors of what libraries warn of
        try:
            outcome = try_one(name)
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.name}"
            outcome = Outcome("fails", f"{type(error).__name__} in {where}: {error}"[:300])
        os.write(writing, json.dumps(asdict(outcome)).encode())
    finally:
        os._exit(0)


def _finish(pipe: int, pid: int) -> Outcome:
    line = os.read(pipe, 1 << 16)
    _, status = os.waitpid(pid, 0)
    if not line:
        return Outcome("fails", f"the process died: {os.waitstatus_to_exitcode(status)}")
    return outcome_of(json.loads(line))


def warm_up() -> None:
    """Import once, before forking, what every trial imports."""
    attempt("llama")


def outcome_of(entry: dict[str, Any]) -> Outcome:
    """Return an outcome from its JSON."""
    return Outcome(**entry | {"left": tuple(entry.get("left", ()))})


def causal_language_models() -> list[str]:
    """Return the architectures that transformers' AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
