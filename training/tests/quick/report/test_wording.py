"""A run in words: tables and figures as a reader wants them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.report.text import closing_lines, figures, sparkline, total_time
from lora_trainer.units import duration, percent, size
from support.run_events import DONE, PLAN, RUN, START, after, evaluated, sample, started, stepped


def closing(*events, width=80):
    return [text for text, _ in closing_lines(after(*events), width)]


def test_the_table_compares_before_and_after():
    assert closing(*RUN)[1:6] == [
        "held-out rows        before        after",
        "exact match      0/8 = 0.0%  6/8 = 75.0%",
        "eval loss            2.5000       0.2500",
        "perplexity           5.0000       0.5000",
        "token accuracy        50.0%        50.0%",
    ]


def test_a_figure_that_was_not_taken_is_a_dash():
    assert "eval loss             -  0.2500" in closing(START, PLAN, evaluated(40, 0.25), DONE)


def test_a_run_without_held_out_rows_has_no_table():
    assert "held-out" not in "\n".join(closing(START, PLAN, stepped(1), DONE))


def test_a_sample_shows_its_four_texts():
    shown = closing(*RUN)
    at = shown.index("held-out sample 1")
    assert shown[at + 1 : at + 5] == [
        "  prompt   lamp on",
        "  expected ON",
        "  before   no idea",
        "  after    ON",
    ]


def test_an_empty_answer_is_said_to_be_empty():
    assert "  after    (empty)" in closing(START, sample(40, "after", ""), DONE)


def test_result_paths_are_absolute():
    assert f"  {Path('out/final_model').absolute()}" in closing(*RUN)


def test_the_totals_come_last():
    totals = "1:39 in total, 1:01 training, 100 tokens/s, 4,000 tokens, peak memory 3.0 GB"
    assert closing(*RUN)[-1] == totals


def test_the_time_between_two_starts_is_named_beside_the_total():
    again = started(time=100.0)
    status = after(START, PLAN, stepped(1, time=10.0), again, stepped(2, time=110.0))
    assert total_time(status) == "0:20 in total (and 1:30 paused between starts)"


def test_a_learning_rate_of_0_in_the_first_step_is_explained():
    first = replace(stepped(1), learning_rate=0.0)
    assert "lr 0 (the warmup begins at 0)" in figures(after(START, PLAN, first))
    assert "lr 0" in figures(after(START, PLAN, replace(stepped(2), learning_rate=0.0)))


@given(width=st.integers(0, 200), answer=st.text(max_size=800))
def test_closing_lines_fit_any_width(width, answer):
    # Cut to characters, not columns: wide characters may take twice as many.
    lines = closing(START, sample(40, "after", answer, prompt=answer), width=width)
    assert all(len(line) <= max(20, width) for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3661, "1:01:01"), (90061, "1d 1:01:01"), (-5, "0:00")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999_600, "1 MB"), (58_400_000, "58 MB"), (2.1e9, "2.1 GB")],
)
def test_sizes_have_decimal_units(count, text):
    assert size(count) == text


def test_a_sparkline_follows_the_losses():
    assert sparkline([3.0, 2.0, float("nan"), 1.0]) == "█▄!▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""


def test_the_share_of_a_row_is_a_percentage():
    assert percent(0.9375) == "93.8%"
