"""The worker's words survive the pipe, and foreign words do no harm."""

import json
import math
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.redaction import Redaction
from lora_trainer.report.html import write_report
from lora_trainer.report.text import closing_lines, lasting_line
from lora_trainer.run.events import (
    KINDS,
    CheckpointSaved,
    Ended,
    Evaluated,
    Failed,
    Finished,
    Generated,
    MemoryReduced,
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
    is_foreign,
    parse_line,
    progress_of,
)
from lora_trainer.serve.gauges import Gauges
from lora_trainer.serve.prometheus import TEXT_TYPE, expose
from lora_trainer.serve.responses import history_view, status_view
from lora_trainer.serve.run_state import RunState, to_json
from lora_trainer.train import channel
from lora_trainer.train.worker import EventPipe, figures_of

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
    MemoryReduced(
        time=1.5, step=1, micro_batch_examples=2, eval_batch_examples=8,
        gradient_checkpointing=True, micro_batch_tokens=512, cause="no more",
    ),
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


def test_a_process_that_nobody_reads_says_so_before_it_stops(monkeypatch):
    reading, writing = os.pipe()
    pipe, done, ended = EventPipe(writing), [], threading.Event()
    monkeypatch.setattr(channel.os, "kill", lambda *_: [done.append("stop"), ended.set()])
    pipe.stop_without_reader(lambda: done.append("say so"))
    os.close(reading)
    assert ended.wait(10)
    assert done == ["say so", "stop"]


def test_progress_is_told_at_most_twice_a_second():
    events = []
    tell = progress_of(events.append, "rows", 9)
    for done in range(1, 9):
        tell(done)
    assert [(event.done, event.total, event.unit) for event in events] == [(1, 9, "rows")]


CURVES = {
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "eval_loss",
    "eval_perplexity",
    "eval_token_accuracy",
}
ODD_VALUES = (
    None, True, "7", 7, -7, 0.5, float("nan"), float("inf"), 10**400, [], [1], {}, {"a": None},
    [{}], [{"rank": 1e300}], "\ud800", "<b>", 1e300,
)  # fmt: skip


def odd_lines():
    """Yield every event with every field in turn replaced by each of the odd values."""
    for event in EXAMPLES:
        raw = json.loads(event.to_line())
        for name in raw.keys() - {"event"}:
            for value in ODD_VALUES:
                yield json.dumps(raw | {name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "3"), ("step", True), ("step", 1.5), ("step", None), ("step", 10**400),
        ("loss", "2.0"), ("loss", []), ("time", float("nan")), ("time", 1e300), ("time", -1.0),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_no_event(field, value):
    line = json.dumps(json.loads(EXAMPLES[4].to_line()) | {field: value})
    assert parse_line(line) is None
    assert is_foreign(line)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("phase", "phase", "resting"), ("plan", "plan", []), ("ranks", "ranks", [{"rank": "0"}]),
        ("failed", "problems", ["no"]), ("failed", "problems", [{"what": 1}]),
        ("resumed", "skipped", "all"), ("generated", "when", "during"), ("eval", "is_best", 1),
    ],
)  # fmt: skip
def test_a_field_that_holds_another_type_is_no_event(kind, field, value):
    (event,) = (one for one in EXAMPLES if one.kind == kind)
    assert parse_line(json.dumps(json.loads(event.to_line()) | {field: value})) is None


def test_a_plan_nested_without_end_is_no_event():
    plan = "[" * 900 + "]" * 900
    assert parse_line(f'{{"event": "plan", "time": 1.0, "plan": {{"a": {plan}}}}}') is None


def test_a_torn_line_is_not_counted_as_foreign():
    assert not is_foreign(EXAMPLES[4].to_line()[:40])
    assert not is_foreign(EXAMPLES[4].to_line())


def test_whatever_fields_hold_every_reader_of_a_recording_copes(tmp_path):
    lines = list(odd_lines())
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    live = RunState(Redaction(["canary"]))
    live.replay(tmp_path / "events.jsonl")
    assert live.lines_skipped == sum(parse_line(line) is None for line in lines) > 500
    gauges = Gauges(tmp_path)
    for event in filter(None, map(parse_line, lines)):
        status = live.add(event)
        assert figures_of(event).keys() <= CURVES
        lasting_line(event, status)
        list(closing_lines(status))
        to_json(status_view(live, gauges)).encode()
        expose(live, gauges, TEXT_TYPE)
    to_json(history_view(live, gauges, 50)).encode()
    assert [path.name for path in write_report(tmp_path)]
