"""Progress of a command, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest

from lora_trainer.report import progress
from lora_trainer.report.progress import Meter


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_left(clock: list[float]) -> None:
    log = io.StringIO()
    with Meter("answering", 64, "prompts", log) as one:
        for second, done in ((5, 4), (11, 16), (15, 20), (22, 32)):
            clock[0] = second
            one.update(done)
    assert log.getvalue().splitlines() == [
        "answering: 64 prompts ...",
        "answering: 16 of 64 prompts, 25.0%, 0:33 left",
        "answering: 32 of 64 prompts, 50.0%, 0:22 left",
    ]


def test_the_share_within_a_batch_moves_the_time_left(clock: list[float]) -> None:
    log = io.StringIO()
    with Meter("answering", 64, "prompts", log) as one:
        clock[0] = 10.0
        one.advance(0.1)
        one.update(0)
    assert "answering: 0 of 64 prompts, 10.0%, 1:30 left" in log.getvalue()


def test_a_terminal_shows_one_line_that_goes_away(clock: list[float]) -> None:
    screen = Terminal()
    with Meter("scoring", 10, "rows", screen) as one:
        clock[0] = 1.0
        one.update(5)
    assert screen.getvalue().split(progress.CLEAR_LINE) == [
        "", "scoring: 10 rows ...\n", "scoring: 5 of 10 rows, 50.0%, 0:01 left", "",
    ]  # fmt: skip
