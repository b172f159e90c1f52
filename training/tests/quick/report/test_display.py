"""What a user sees of a run: in a log, on a terminal, and on terminals in trouble."""

import fcntl
import io
import json
import os
import re
import struct
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_trainer.report import console as display_module
from lora_trainer.report.console import Display, panel_rows
from lora_trainer.run.events import (
    CheckpointSaved,
    Event,
    Failed,
    PhaseChanged,
    Progress,
    Restarted,
    Resumed,
    Warned,
    parse_line,
)
from lora_trainer.run.status import RunStatus, fold
from support.run_events import DONE, PLAN, RUN, START, after, evaluated, sample, stepped


def play(display, events):
    status = RunStatus()
    for event in events:
        status = fold(status, event)
        display.show(event, status)
    display.close()


def plain(*events, **options):
    stream = io.StringIO()
    play(Display(stream, **options), events)
    return stream.getvalue()


class Terminal:
    """A pseudo-terminal whose screen is read, if it is read, by a thread."""

    def __init__(self, columns=80, rows=24, is_read=True):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._data = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        if is_read:
            self._thread.start()

    def _read(self):
        try:
            while chunk := os.read(self.master, 65536):
                self._data += chunk
        except OSError:  # all have closed the other end
            pass

    def text(self):
        """Close the terminal and return all that was written to it."""
        self.stream.close()
        self._thread.join(5)
        os.close(self.master)
        return self._data.decode()


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def play_live(events, **size):
        terminal = Terminal(**size)
        play(Display(terminal.stream), events)
        return terminal.text()

    return play_live


def test_a_log_holds_no_control_codes():
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", plain(*RUN))


def test_a_log_shows_a_step_at_most_every_ten_seconds():
    shown = re.findall(r"step (\d+)/40,", plain(START, PLAN, *(stepped(i) for i in range(1, 41))))
    assert shown == ["1", "11", "21", "31", "40"]


def test_a_log_keeps_to_the_logging_interval():
    steps = [stepped(i, time=100 * i) for i in range(1, 41)]
    shown = re.findall(r"step (\d+)/40,", plain(START, PLAN, *steps, logging_steps=15))
    assert shown == ["1", "15", "30", "40"]


def test_a_step_line_names_its_figures():
    text = plain(START, PLAN, stepped(1))
    assert "step 1/40, loss 1.0000, lr 1.00e-03, 100 tokens/s, memory 2.0 GB, 0:39 left" in text


def test_a_log_shows_progress_rarely_and_its_end_always():
    events = [Progress(time=i / 100, done=i, total=500, unit="rows") for i in range(501)]
    shown = plain(START, PhaseChanged(time=0.0, phase="tokenizing"), *events)
    assert re.findall(r"tokenizing (.*)", shown) == ["1 of 500 rows", "500 of 500 rows"]


def test_a_warning_is_shown_once():
    assert plain(START, *[Warned(time=1.0, message="mind the gap")] * 3).count("mind the gap") == 1


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (PhaseChanged(time=0.0, phase="loading", detail="a model"), "loading: a model"),
        (evaluated(3, 0.5), "eval at step 3: loss 0.5000, perplexity 1.0000, token accuracy 50.0%"),
        (
            CheckpointSaved(time=0.0, step=3, path="c/3", bytes=2_000_000, seconds=0.5),
            "checkpoint at step 3: c/3, 2 MB, 0.5 s",
        ),
        (
            Resumed(time=0.0, step=3, path="c/3", skipped=["c/4"]),
            "resumed at step 3 from c/3; skipped damaged checkpoints: c/4",
        ),
        (
            Restarted(time=0.0, attempt=2, cause="killed for memory", exit_code=137),
            "restart 2: killed for memory (exit code 137)",
        ),
        (
            Failed(time=0.0, exit_code=65, problems=[{"what": "row 3 is broken"}]),
            "failed: row 3 is broken",
        ),
    ],
)
def test_what_matters_gets_a_lasting_line(event, text):
    assert text in plain(START, event)


def test_evaluations_between_steps_do_not_repeat_the_phases():
    events = [PhaseChanged(time=5.0, phase=phase) for phase in ("evaluating", "saving", "training")]
    assert plain(START, PLAN, stepped(1), *events) == plain(START, PLAN, stepped(1))


def test_a_note_is_a_lasting_line():
    stream = io.StringIO()
    with Display(stream) as display:
        display.print_line("status page: http://127.0.0.1:8080/")
    assert "status page: http://127.0.0.1:8080/\n" in stream.getvalue()


def test_a_run_that_did_not_finish_has_no_closing_tables():
    assert "held-out sample" not in plain(*RUN[:-1])


def rows_of(*events, width=76, losses=(2.0, 1.0)):
    rows = list(panel_rows(after(*events), list(losses), width, 0.0, True))
    return [row.plain for row in rows]


def test_the_panel_shows_step_loss_speed_memory_and_time_left():
    shown = "\n".join(rows_of(START, PLAN, stepped(1), stepped(20)))
    for fact in ("training  step 20/40  ━", "50%", "0:20 left", "loss 1.0000  █▁", "lr 1.00e-03",
                 "100 tokens/s", "memory 2.0 GB", "epoch 2.00 of 4"):  # fmt: skip
        assert fact in shown


def test_the_panel_shows_work_outside_of_training():
    working = [PhaseChanged(phase="loading", detail="m"), Progress(done=1, total=4, unit="bytes")]
    shown = rows_of(START, *working)
    assert shown[0].startswith("loading  m  ━")
    assert shown[0].endswith("25% · 1 bytes of 4 bytes")


def test_the_panel_shows_the_last_warning_and_the_restarts():
    trouble = [Warned(message="w1"), Warned(message="w2"),
               Restarted(attempt=1, cause="c", exit_code=1)]  # fmt: skip
    shown = "\n".join(rows_of(START, *trouble))
    assert "2 warnings, the last: w2" in shown
    assert "restarts 1" in shown


@given(width=st.integers(-4, 120), loss=st.floats())
def test_the_panel_can_be_drawn_at_any_width(width, loss):
    console = Console(file=io.StringIO(), width=max(1, width))
    for row in panel_rows(after(*RUN[:10], stepped(11, loss=loss)), [loss], width, 1.0, True):
        console.print(row)


def test_a_terminal_shows_a_panel_and_keeps_the_lasting_lines(live, monkeypatch):
    monkeypatch.setattr(display_module, "REFRESH_SECONDS", 0)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", live(RUN))
    assert "╭─ demo" in shown
    assert "training  step" in shown
    assert "eval at step 40" in shown
    assert "held-out sample 1" in shown


def test_a_terminal_gets_its_cursor_back(live):
    shown = live(RUN)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_markup_in_an_answer_stays_text_on_a_terminal(live):
    shown = live([START, sample(40, "after", "[red]x[/red] \x1b[2J"), DONE])
    assert "[red]x[/red] \\x1b[2J" in shown


def test_no_color_is_honoured_on_a_terminal(live, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    codes = re.findall(r"\x1b\[([0-9;]+)m", live(RUN))
    assert not [code for code in codes if re.search(r"\b(3[0-7]|4[0-7]|9[0-7]|38|48)\b", code)]


def test_a_terminal_has_colour_otherwise(live):
    assert "\x1b[36m" in live(RUN)


def test_a_dumb_terminal_gets_plain_lines(live, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in live(RUN)


@pytest.mark.parametrize(("columns", "rows"), [(0, 0), (1, 1), (10, 3), (30, 5)])
def test_a_tiny_terminal_still_gets_the_lasting_lines(live, columns, rows):
    shown = live(RUN, columns=columns, rows=rows)
    assert "finished" in shown
    assert str(Path("out/final_model").absolute()) in shown


def test_a_terminal_that_takes_nothing_does_not_hold_the_run_up(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(display_module, "PATIENCE_SECONDS", 0.2)
    terminal = Terminal(is_read=False)
    display = Display(terminal.stream)
    begun = time.monotonic()
    for i in range(3000):
        display.show(PhaseChanged(phase="loading", detail="x" * 100 + str(i)), RunStatus())
    display.close()
    assert time.monotonic() - begun < 2
    os.close(terminal.master)
    display._thread.join(5)
    assert not display._thread.is_alive()
    terminal.stream.close()


def test_a_closed_stream_does_not_raise():
    stream = io.StringIO()
    stream.close()
    play(Display(stream), RUN)


def test_a_missing_stdout_does_not_raise(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    play(Display(), RUN)


def test_a_stream_without_unicode_gets_escapes():
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii", write_through=True)
    play(Display(stream), [START, sample(40, "after", "é日"), DONE])
    assert b"\\xe9\\u65e5" in buffer.getvalue()


def test_a_fault_of_the_display_does_not_reach_the_run(monkeypatch):
    def fail(*_):
        raise RuntimeError("broken display")

    monkeypatch.setattr(display_module, "lasting_line", fail)
    assert "step 1" in plain(START, stepped(1))


def test_closing_twice_is_harmless():
    stream = io.StringIO()
    display = Display(stream)
    play(display, RUN)
    shown = stream.getvalue()
    display.close()
    assert stream.getvalue() == shown


def test_an_unknown_event_is_passed_over():
    assert plain(Event(time=1.0)) == ""


def test_quiet_prints_warnings_and_restarts_alone(tmp_path):
    shown = plain(*RUN[:-1], Warned(time=41.0, message="look here"), DONE, is_quiet=True)
    assert [line.split(maxsplit=1)[1] for line in shown.splitlines()] == ["warning: look here"]


def test_json_prints_each_event_as_it_is_recorded():
    shown = plain(*RUN, is_json=True)
    kinds = [json.loads(line)["event"] for line in shown.splitlines()]
    assert kinds[0] == "run_started"
    assert kinds[-1] == DONE.kind
    assert [parse_line(line) for line in shown.splitlines()] == [
        event for event in RUN if type(event) is not Progress
    ]


def test_json_prints_steps_by_logging_steps_and_notes_as_objects():
    stream = io.StringIO()
    with Display(stream, 10, is_json=True) as display:
        display.print_line("status: http://127.0.0.1:1")
        status = RunStatus()
        for event in (START, PLAN, *(stepped(n) for n in range(1, 41))):
            status = fold(status, event)
            display.show(event, status)
    printed = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (printed[0]["event"], printed[0]["text"]) == ("note", "status: http://127.0.0.1:1")
    assert [one["step"] for one in printed if one["event"] == "step"] == [1, 10, 20, 30, 40]


def test_quiet_json_prints_trouble_alone():
    shown = plain(*RUN[:-1], Warned(time=41.0, message="x"), DONE, is_quiet=True, is_json=True)
    assert [json.loads(line)["event"] for line in shown.splitlines()] == ["warning"]


def test_json_has_null_for_a_loss_that_is_no_number():
    shown = plain(START, PLAN, stepped(1, loss=float("nan")), is_json=True)
    assert '"loss": null' in shown
    assert "NaN" not in shown
