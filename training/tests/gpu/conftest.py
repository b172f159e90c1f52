"""What a GPU owner's suite prints: one page, a line for each check, with what was measured."""

from __future__ import annotations

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
