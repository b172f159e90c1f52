"""Nothing written to a terminal steers it, and no terminal in trouble raises."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.report.terminal import Sink, clean, one_line


@given(text=st.text())
def test_no_text_steers_the_terminal(text):
    assert clean(text).isprintable()


@given(text=st.text(max_size=3000), limit=st.integers(3, 100))
def test_no_answer_floods_the_terminal(text, limit):
    assert len(clean(text, limit)) <= limit * len("\\U0001f600")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31mred", "\\x1b[31mred"), ("a\r\nb\tc", "a\\r\\nb\\tc"), ("\u202eabc", "\\u202eabc"),
     ("[red]x[/red]", "[red]x[/red]"), ("a\u00a0b", "a b"), ("日本 é", "日本 é")],
)  # fmt: skip
def test_control_characters_are_shown_by_their_escapes(text, shown):
    assert clean(text) == shown


def test_white_space_becomes_one_line():
    assert one_line(" a\n\tb  c\x07") == "a b c\\x07"


def test_a_sink_without_a_stream_swallows_what_is_written():
    sink = Sink(None)
    assert (sink.write("lost"), sink.size(), sink.isatty()) == (4, (80, 24), False)


def test_a_pipe_that_nobody_reads_is_given_up():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        sink = Sink(stream)
        sink.write("x")
    assert sink.is_dead
    sink.close()


def test_a_descriptor_of_its_own_outlives_the_stream(tmp_path):
    path = tmp_path / "log"
    with path.open("w") as stream:
        sink = Sink(stream)
    sink.write("still here")
    sink.close()
    assert path.read_text() == "still here"
