"""The worker's words survive the pipe, and foreign words do no harm."""

import json
import math
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.events import (
    KINDS,
    CheckpointSaved,
    Ended,
    Evaluated,
    Failed,
    Finished,
    Generated,
    PhaseChanged,
    Planned,
    Progress,
    RanksMeasured,
    Restarted,
    Resumed,
    RunStarted,
    Sample,
    StepDone,
    Stopped,
    Warned,
    parse_line,
    progress_of,
)
from lora_trainer.worker import EventPipe

EXAMPLES = [
    RunStarted(time=1.5, run_name="demo", config_digest="ab", output_dir="/out", attempt=1, pid=7),
    PhaseChanged(time=1.5, phase="loading", detail="a model"),
    Planned(time=1.5, plan={"total_steps": 3, "reasons": ["so"], "nested": {"a": None}}),
    Progress(time=1.5, done=3, total=9, unit="rows"),
    StepDone(
        time=1.5, step=1, epoch=0.1, loss=2.0, learning_rate=1e-3, grad_norm=1.0, step_seconds=0.5,
        tokens=10, trained_tokens=4, tokens_seen=10, memory_bytes=99, gpu_memory_bytes=5,
    ),
    RanksMeasured(
        time=1.5, step=1, slowest=1, ranks=[{"rank": 0, "seconds": 0.5}, {"rank": 1, "seconds": 1}]
    ),
    Evaluated(
        time=1.5, step=1, eval_loss=1.0, eval_perplexity=2.7, eval_token_accuracy=0.5,
        eval_tokens=8, eval_seconds=0.1, is_best=True,
    ),
    Generated(time=1.5, step=0, when="before", exact_match=0.25, rows=8, seconds=1.0),
    Sample(time=1.5, step=0, when="after", index=2, prompt="a\nb", expected="é", answer="\x1b[0m"),
    CheckpointSaved(time=1.5, step=1, path="checkpoints/step-000001", bytes=5, seconds=0.2),
    Resumed(time=1.5, step=1, path="checkpoints/step-000001", skipped=["checkpoints/step-000002"]),
    Warned(time=1.5, message="mind"),
    Restarted(time=1.5, attempt=1, cause="killed", exit_code=137),
    Failed(time=1.5, exit_code=65, problems=[{"what": "bad row", "where": "a.jsonl:3"}]),
    Finished(
        time=1.5, step=1, train_seconds=9.0, tokens_seen=10, peak_memory_bytes=9, results=["x"]
    ),
    Stopped(time=1.5, step=1, signal="SIGTERM"),
    Ended(time=1.5, exit_code=0),
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_every_kind_has_an_example_here():
    assert {event.kind for event in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_a_line_parses_back_to_its_event(event):
    assert parse_line(event.to_line()) == event


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_an_event_is_exactly_one_line(event):
    assert event.to_line().count("\n") == 1
    assert event.to_line().endswith("\n")


@given(text=st.text())
def test_any_text_comes_back_unchanged(text):
    assert parse_line(Warned(message=text).to_line()).message == text


def test_a_loss_that_is_not_finite_comes_back():
    line = EXAMPLES[4].to_line().replace('"loss": 2.0', '"loss": NaN')
    assert math.isnan(parse_line(line).loss)


def test_a_field_of_a_newer_version_is_left_out():
    newer = json.loads(EXAMPLES[-1].to_line()) | {"mood": "good"}
    assert parse_line(json.dumps(newer)) == EXAMPLES[-1]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_a_torn_line_is_no_event(event):
    line = event.to_line()
    assert parse_line(line[: len(line) // 2]) is None


def test_a_line_that_lacks_a_field_is_no_event():
    assert parse_line('{"event": "stopped", "time": 1.0, "step": 3}') is None


def test_an_unknown_kind_is_no_event():
    assert parse_line('{"event": "party", "time": 1.0}') is None


@given(line=st.text() | json_values.map(json.dumps))
def test_no_foreign_line_raises(line):
    assert parse_line(line) is None


@given(kind=st.sampled_from(sorted(KINDS)), raw=st.dictionaries(st.text(), json_values))
def test_no_foreign_fields_raise(kind, raw):
    event = parse_line(json.dumps({**raw, "event": kind}))
    assert event is None or event.kind == kind


def test_reader_that_does_not_read_holds_up_nobody_and_loses_nothing():
    reading, writing = os.pipe()
    pipe = EventPipe(writing)
    events = [Warned(message=f"{number} " + 1000 * "x") for number in range(500)]
    began = time.monotonic()
    for event in events:  # half a megabyte; a pipe takes 64 KiB
        pipe.emit(event)
    assert time.monotonic() - began < 2.0
    with os.fdopen(reading) as file:
        closing = threading.Thread(target=pipe.close)
        closing.start()
        assert [parse_line(file.readline()) for _ in events] == events
        closing.join()


def test_progress_is_told_at_most_twice_a_second():
    told = []
    tell = progress_of(told.append, "rows", 9)
    for done in range(1, 9):
        tell(done)
    assert [(event.done, event.total, event.unit) for event in told] == [(1, 9, "rows")]
