"""The image that all docker tests share, and the projects made of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from support.composed import Project, build

IMAGE = "lora-trainer:tested"


@dataclass(frozen=True)
class Image:
    """The built image, and what its build said."""

    name: str
    log: str
    seconds: float


@pytest.fixture(scope="session")
def engine() -> None:
    """Skip without an engine; fail where CI has promised one."""
    answers = (
        shutil.which("docker")
        and not subprocess.run(["docker", "version"], capture_output=True, check=False).returncode
    )
    if not answers:
        text = "no Docker engine answers"
        if os.environ.get("LORA_REQUIRE_DOCKER") == "1":
            pytest.fail(text)
        pytest.skip(text)


@pytest.fixture(scope="session")
def image(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Build the cpu stack from a clean context with build.sh, every secret given."""
    began = time.monotonic()
    built = build(IMAGE, tmp_path_factory.mktemp("build"))
    assert built.returncode == 0, built.stderr[-6000:]
    return Image(IMAGE, built.stdout + built.stderr, time.monotonic() - began)


@pytest.fixture(scope="module")
def make_project(
    image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Project]]:
    """Make projects that are taken down when the module's tests are done."""
    with ExitStack() as stack:

        def make(name: str, **settings: Any) -> Project:
            root = tmp_path_factory.mktemp(name)
            for folder in (root, *root.parents[:2]):  # pytest makes them for its user alone
                folder.chmod(0o755)
            return stack.enter_context(Project(root, image.name, **settings))

        yield make
