"""What this tier holds: tests that import no torch and start no process."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REAL_RUN = "test_kill_and_load.py"  # the one that may start processes
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
# transformers 4 imports torch with its chat templates.
IS_LIGHT = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
started: list[str] = []


def _watch(event: str, _: object) -> None:
    if event in STARTS:
        started.append(event)


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def light(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that imports torch or starts a process: it belongs to another tier."""
    had_torch = "torch" in sys.modules
    started.clear()
    yield
    if request.path.name == REAL_RUN:
        return
    assert had_torch or not IS_LIGHT or "torch" not in sys.modules, "move it to tests/model"
    assert not started, "move it to tests/process"


@pytest.fixture
def is_alone(request: pytest.FixtureRequest) -> bool:
    """Return whether this tier's tests are the only ones of this session."""
    return all(HERE in item.path.parents for item in request.session.items)
