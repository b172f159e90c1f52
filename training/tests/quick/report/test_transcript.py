"""What a run prints is kept in a file where the environment names a folder."""

from __future__ import annotations

import pytest

from lora_trainer.errors import DataError
from lora_trainer.redaction import Redaction
from lora_trainer.report.console_log import VARIABLE, Transcript
from lora_trainer.run.status import RunStatus, fold
from support.run_events import started


def test_lines_and_the_last_fault_are_kept_and_appended(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(DataError),
            Transcript({VARIABLE: str(tmp_path)}, "mine", 1, Redaction()) as transcript,
        ):
            transcript.print_line("status: here")
            raise DataError.of("row 7 is empty", remedy="fill it")
    text = (tmp_path / "mine.log").read_text()
    assert text.count("status: here") == 2
    assert text.rstrip().endswith("exit code 65 (data)")


@pytest.mark.parametrize("environ", [{}, {VARIABLE: ""}, {VARIABLE: "/proc/nowhere"}])
def test_without_a_folder_that_can_be_written_nothing_is_kept_and_nothing_fails(environ):
    warned = []
    with Transcript(environ, "mine", 1, Redaction(), warned.append) as transcript:
        transcript.print_line("status: here")
        transcript.show(*_first())
    assert len(warned) == bool(environ.get(VARIABLE))


def test_full_disk_costs_the_file_and_one_warning_and_leaves_the_fault(tmp_path):
    (tmp_path / "mine.log").symlink_to("/dev/full")
    warned = []
    environ = {VARIABLE: str(tmp_path)}
    with (
        pytest.raises(DataError),
        Transcript(environ, "mine", 1, Redaction(), warned.append) as transcript,
    ):
        transcript.print_line("status: here")
        for _ in range(3):
            transcript.show(*_first())
        raise DataError.of("row 7 is empty", remedy="fill it")
    (warning,) = warned
    assert "mine.log is not written: No space left on device" in warning


def test_no_secret_is_in_the_file_nor_in_its_name(tmp_path):
    environ = {VARIABLE: str(tmp_path)}
    with (
        pytest.raises(DataError),
        Transcript(environ, "canary-7", 1, Redaction(["canary-7"])) as transcript,
    ):
        transcript.print_line("a finished run is in /outputs/canary-7")
        raise DataError.of("no row in canary-7", remedy="look at canary-7")
    text = (tmp_path / "***.log").read_text()
    assert "canary" not in text
    assert "remedy: look at ***" in text


def _first():
    event = started()
    return event, fold(RunStatus(), event)
