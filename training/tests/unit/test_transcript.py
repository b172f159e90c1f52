"""What a run prints is kept in a file where the environment names a folder."""

from __future__ import annotations

import pytest
from run_events import started

from lora_trainer.errors import DataError
from lora_trainer.status import RunStatus, fold
from lora_trainer.transcript import VARIABLE, Transcript


def test_lines_and_the_last_fault_are_kept_and_appended(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(DataError),
            Transcript({VARIABLE: str(tmp_path)}, "mine", 1) as transcript,
        ):
            transcript.note("status: here")
            raise DataError.of("row 7 is empty", remedy="fill it")
    text = (tmp_path / "mine.log").read_text()
    assert text.count("status: here") == 2
    assert text.rstrip().endswith("exit code 65 (data)")


@pytest.mark.parametrize("environ", [{}, {VARIABLE: ""}, {VARIABLE: "/proc/nowhere"}])
def test_without_a_folder_that_can_be_written_nothing_is_kept_and_nothing_fails(environ):
    with Transcript(environ, "mine", 1) as transcript:
        transcript.note("status: here")
        transcript.show(*_first())


def _first():
    event = started()
    return event, fold(RunStatus(), event)
