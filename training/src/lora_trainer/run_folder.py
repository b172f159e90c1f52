"""The files of a run's output folder, by name: the one list of what a run writes.

`RunFolder.events` is a file's name, `RunFolder(folder).events` its path. Imports nothing of the
package: the configuration, the supervisor, the worker and the commands read the same folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import overload


class _Entry:
    """A file or folder of a run: a name on the class, a path on an instance."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, run: None, owner: type[RunFolder]) -> str: ...
    @overload
    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path: ...
    def __get__(self, run: RunFolder | None, owner: type[RunFolder]) -> str | Path:
        return self._name if run is None else run.path / self._name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The output folder of a run."""

    path: Path

    digest = _Entry("config.digest")  # by which the run is known
    resolved = _Entry("config.resolved.json")
    plan = _Entry("plan.json")
    data = _Entry("data.json")
    environment = _Entry("environment.json")
    events = _Entry("events.jsonl")
    log = _Entry("train.log")
    tracker_logs = _Entry("logs")
    checkpoints = _Entry("checkpoints")
    initial_adapter = _Entry("initial_adapter")
    memory_limits = _Entry("memory.json")  # what the run was cut down to when memory ran out
    server = _Entry("server.json")  # where the status server answers, while it does
    final_model = _Entry("final_model")
    unfinished_model = _Entry(".final_model.writing")
    report = _Entry("report.html")
    loss_chart = _Entry("loss.png")
    results = _Entry("results.json")
    done = _Entry("DONE")
    # The run's process holds it; whoever archives or removes the run, too.
    lock = _Entry(".lock")
    # Where a run's files wait while it is archived. While it exists, archiving is not complete.
    archiving = _Entry(".archiving")


# Everything that a run writes, but for what whoever archives it needs.
OWN_NAMES = frozenset(
    entry._name for entry in vars(RunFolder).values() if isinstance(entry, _Entry)
) - {RunFolder.lock, RunFolder.archiving}
# What a kill leaves of a file that was being written, and of the test of a folder.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(writing|\d+\.tmp)|\.writable-\d+")


def is_own(name: str) -> bool:
    """Tell whether a run writes a file or folder of this name; its lock and archives aside."""
    temporary = _TEMPORARY.fullmatch(name)
    return name in OWN_NAMES or (temporary is not None and temporary["name"] in (*OWN_NAMES, None))
