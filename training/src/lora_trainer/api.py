"""Training from Python: `from lora_trainer import load_config, train`.

The run is that of `lora-trainer train`: this process becomes its supervisor, and torch is
imported in the worker that it starts. So a notebook keeps its memory and its GPU, and a script
needs no `if __name__ == "__main__"`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .commands.train import run_shown
from .config.settings import Settings, resolve
from .errors import TrainerError
from .faults import disk_fault, limit_fault
from .host import environment, streams
from .run.events import Event
from .run.results import RunResults, read_results
from .run.status import RunStatus
from .supervise.secrets import redaction_of

ConfigPath = str | os.PathLike[str]


def load_config(path: ConfigPath | None = None, /, **values: Any) -> Settings:
    """Return the configuration of a run: a file's keys, the environment's, and then `values`.

    Keys and aliases are those of a config file. Without `path`, no file is read. The result is
    frozen: `.config` holds the values in their sections, `.origins` says where each came from.

    Raises:
        ConfigError: with every problem at once; its text lists them.
        AccessError: the file may not be read.
    """
    with _explained():
        return resolve(Path(path) if path is not None else None, os.environ, (), values)


def train(
    config: Settings | ConfigPath | None = None,
    /,
    *,
    on_event: Callable[[Event, RunStatus], object] = lambda *_: None,
    **values: Any,
) -> RunResults:
    """Train as `lora-trainer train` does, and return the content of `results.json`.

    `config` is the result of `load_config`, or what it takes; `values` are keys of the config.
    `on_event` is called with each event and the run's status after it. To stop, interrupt the
    process or the kernel: a checkpoint is saved. The same call resumes the run; called for a
    finished run, it returns that run's results.

    Raises:
        TrainerError: the run was refused, failed or was stopped. `exit_code` is that of the
            command, `problems` say what, where, why, and what to do.
        TypeError: `config` is loaded already, and `values` are given.
    """
    if isinstance(config, Settings):
        if values:
            raise TypeError("pass the values to load_config")
        settings = config
    else:
        settings = load_config(config, **values)
    with _explained(), _environment(), streams.redacted(redaction_of(settings)):
        supervisor = run_shown(settings, on_event)
    return read_results(supervisor.output_dir) or RunResults("finished", 0)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Have an error that leaves say all that the command prints of it."""
    try:
        yield
    except TrainerError as error:
        error.args = (error.block(),)
        raise
    except OSError as error:
        fault = limit_fault(error) or disk_fault(error)
        if fault is None:
            raise
        fault.args = (fault.block(),)
        raise fault from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Give workers the environment of the command; the caller's is as before afterwards."""
    before = set(os.environ)
    environment.set_defaults(os.environ)
    added = set(os.environ) - before
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
