"""The settings that every test relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[2] / "conftest.py"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import signal\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFTEST.parent,
    )
    return done.stdout.strip()


def test_ctrl_c_reaches_the_tests_that_a_script_starts_in_its_background() -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert run(f"{ignored}; import conftest; print(signal.getsignal(2))").startswith("<built-in")


def test_every_test_has_a_time_limit(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.hasplugin("timeout")
    assert float(os.environ["PYTEST_TIMEOUT"]) > 0
