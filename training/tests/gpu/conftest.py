"""What a GPU owner's suite prints: one page, a line for each check, with what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

LINES: list[str] = []


@pytest.fixture
def page():
    """Take a line of the page: what was checked, and the figure."""
    return LINES.append


def pytest_terminal_summary(terminalreporter):
    if not LINES:
        return
    terminalreporter.section("measured on this machine's GPUs")
    for line in LINES:
        terminalreporter.write_line(line)


def pytest_collection_modifyitems(items):
    """Let CUDA, Triton and NCCL say what they have to say: their notices are no failures."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
