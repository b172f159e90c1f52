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
HAS_TORCH = pytest.StashKey[bool]()


def _watch(event: str, _: object) -> None:
    if event in STARTS:
        started.append(event)


sys.addaudithook(_watch)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[HAS_TORCH] = "torch" in sys.modules


@pytest.fixture(scope="session", autouse=True)
def fonts() -> None:
    """Have matplotlib look for fonts, which starts processes, before a test is watched."""
    import matplotlib.font_manager  # noqa: F401


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
def is_torch_collected(request: pytest.FixtureRequest) -> bool:
    """Return whether torch was imported by the end of the collection."""
    return request.config.stash[HAS_TORCH]


@pytest.fixture
def is_alone(request: pytest.FixtureRequest) -> bool:
    """Return whether this tier's tests are the only ones of this session."""
    return all(HERE in item.path.parents for item in request.session.items)
