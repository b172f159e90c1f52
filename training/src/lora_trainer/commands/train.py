"""`lora-trainer train`, and `lora_trainer.train` in Python: one run, shown as it goes."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable

from ..config.settings import Settings
from ..errors import ConfigError, UnavailableError
from ..host import streams
from ..host.launcher import Launch, read_launch
from ..host.scratch import remove_temporary
from ..report.console import Display
from ..report.console_log import Transcript
from ..run.events import Event
from ..run.status import RunStatus
from ..supervise.follower import Follower
from ..supervise.secrets import redaction_of
from ..supervise.supervisor import Supervisor
from . import check

OLDEST_TORCH = (2, 2)  # that lets a launcher's processes meet

Listener = Callable[[Event, RunStatus], object]


def run_shown(settings: Settings, listener: Listener = lambda *_: None) -> Supervisor | Follower:
    """Do a whole run; show its events, keep them in the transcript, and pass them to `listener`.

    Where a launcher has started several processes, rank 0's does this, and the others follow.

    Raises:
        TrainerError: with the exit code of whatever ended it.
    """
    redaction = redaction_of(settings)
    streams.strike(redaction)
    remove_temporary()
    launch = _launch()
    if launch is not None and not launch.is_first:
        follower = Follower(settings, launch)
        follower.run(check.preflight)
        return follower
    monitoring = settings.config.monitoring
    steps, is_json = monitoring.logging_steps, monitoring.log_format == "json"
    name = settings.config.output.run_name or "run"
    with (
        Display(logging_steps=steps, is_quiet=monitoring.quiet, is_json=is_json) as display,
        Transcript(os.environ, name, steps, redaction, display.print_line) as kept,
    ):

        def show(event: Event, status: RunStatus) -> None:
            display.show(event, status)
            kept.show(event, status)
            listener(event, status)

        def print_line(text: str) -> None:
            display.print_line(text)
            kept.print_line(text)

        supervisor = Supervisor(settings, show, print_line=print_line, launch=launch)
        supervisor.run(check.preflight)
    return supervisor


def _launch() -> Launch | None:
    """Return what a launcher says of this process.

    Raises:
        ConfigError: its variables make no sense.
        UnavailableError: the processes could not meet with this torch.
    """
    try:
        launch = read_launch(os.environ)
    except ValueError as error:
        raise ConfigError.of(
            "the variables of a launcher make no sense",
            where="environment",
            why=str(error),
            remedy="start with torchrun or srun, or unset RANK and WORLD_SIZE to train in one "
            "process",
        ) from None
    if launch is not None and not launch.is_alone:
        refuse_old_torch(importlib.metadata.version("torch"))
    return launch


def refuse_old_torch(version: str, alone: str = "unset RANK and WORLD_SIZE") -> None:
    """Refuse processes of a launcher where torch 2.1 would let them wait for each other forever.

    `alone` says how to start on this machine alone.
    """
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        raise UnavailableError.of(
            "several processes cannot be started by a launcher on this stack",
            where=f"torch {version}",
            why="they do not meet with torch 2.1 (stack cu121)",
            remedy=f"{alone}: the run then uses all GPUs of this machine; or use the stack current",
        )
