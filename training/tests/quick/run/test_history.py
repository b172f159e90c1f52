"""What was done counts once, however often it was begun, and however long the run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.run.events import PhaseChanged, Restarted, Resumed, Warned
from lora_trainer.run.history import KEPT_MOMENTS, KEPT_POINTS, WHOLE, History, stretches
from support.run_events import evaluated, sample, saved, started, stepped


def history(*events, capacity=8192):
    kept = History(capacity)
    for event in events:
        kept.add(event)
    return kept


def test_history_gives_every_step_where_there_is_room():
    points = history(*(stepped(i, loss=i) for i in (1, 2, 3))).points(10)
    assert [(p.step, p.loss, p.tokens_per_second) for p in points] == [
        (1, 1, 100),
        (2, 2, 100),
        (3, 3, 100),
    ]


def test_history_drops_the_points_after_a_resume():
    kept = history(stepped(1), stepped(2), evaluated(2, 1.0), stepped(3), evaluated(3, 0.5),
                   Resumed(step=2, path="c"))  # fmt: skip
    assert ([p.step for p in kept.points(9)], [e.step for e in kept.evals()]) == ([1, 2], [2])


def test_history_drops_the_points_of_a_run_begun_anew():
    kept = history(stepped(1, loss=9.0), stepped(2), stepped(1, loss=5.0))
    assert [(p.step, p.loss) for p in kept.points(9)] == [(1, 5.0)]


def test_thinned_points_are_means_that_keep_the_extremes():
    points = history(*(stepped(i, loss=float(i), seconds=i) for i in range(1, 5))).points(2)
    assert [(p.step, p.loss, p.loss_min, p.loss_max) for p in points] == [
        (2, 1.5, 1, 2),
        (4, 3.5, 3, 4),
    ]
    assert points[1].tokens_per_second == pytest.approx(200 / 7)


def test_a_loss_that_is_not_finite_shows_in_a_thinned_point():
    assert math.isnan(history(stepped(1), stepped(2, loss=math.nan), stepped(3)).points(1)[0].loss)


@given(steps=st.integers(1, 300), capacity=st.integers(2, 16), wanted=st.integers(1, 40))
def test_a_long_history_stays_bounded_and_whole(steps, capacity, wanted):
    kept = history(*(stepped(i) for i in range(1, steps + 1)), capacity=capacity)
    points = kept.points(wanted)
    assert len(points) <= wanted
    assert len(kept._points) <= capacity
    assert (points[0].first_step, points[-1].step) == (1, steps)
    assert sum(p.tokens for p in points) == 100 * steps


@given(steps=st.integers(1, 100), back=st.integers(0, 100), capacity=st.integers(2, 16))
def test_no_point_of_a_thinned_history_reaches_beyond_a_resume(steps, back, capacity):
    kept = history(*(stepped(i) for i in range(1, steps + 1)), Resumed(step=back, path="c"),
                   capacity=capacity)  # fmt: skip
    assert all(point.step <= back for point in kept.points(1000))


def test_a_resume_drops_the_checkpoints_and_samples_after_it():
    events = [stepped(1), saved(1), stepped(2), saved(2), sample(0, "before"), sample(2, "after")]
    kept = history(*events, Resumed(step=1, path="c"))
    assert [checkpoint.step for checkpoint in kept.checkpoints()] == [1]
    assert list(kept.samples) == [(0, "before")]


def test_a_run_begun_anew_before_its_first_step_counts_its_evaluations_once():
    kept = history(stepped(1), stepped(2), evaluated(2, 1.0), evaluated(0, 3.0), stepped(1))
    assert [score.step for score in kept.evals()] == [0]


def test_a_checkpoint_that_is_saved_again_counts_once():
    kept = history(saved(1), saved(2), saved(1, size=20))
    assert [(one.step, one.bytes) for one in kept.checkpoints()] == [(1, 20), (2, 10)]


def test_evaluations_stay_bounded_and_the_newest_stay():
    kept = history(*(evaluated(i, 1.0) for i in range(9)), capacity=4)
    assert [score.step for score in kept.evals()] == [5, 6, 7, 8]


def test_a_whole_history_keeps_every_step():
    kept = history(*(stepped(i) for i in range(1, KEPT_POINTS + 2)), capacity=WHOLE)
    assert len(kept.points(WHOLE)) == KEPT_POINTS + 1


def test_the_timeline_keeps_what_was_redone():
    kept = history(started(), Resumed(step=1, path="c"), started(attempt=1))
    assert [(moment.kind, moment.text) for moment in kept.timeline] == [
        ("start", "Run started"),
        ("resume", "Resumed from the checkpoint of step 1"),
        ("start", "Run started, attempt 2"),
    ]


def test_alternating_phases_do_not_fill_the_timeline():
    phases = [PhaseChanged(phase=phase) for phase in ("training", "evaluating") * 50]
    assert len(history(*phases).timeline) == 2


def test_a_phase_is_told_again_after_a_restart():
    training = PhaseChanged(phase="training")
    kept = history(training, Restarted(attempt=1, cause="c", exit_code=1), training)
    assert [moment.kind for moment in kept.timeline] == ["phase", "bad", "phase"]


def test_a_long_timeline_keeps_its_beginning_and_its_end():
    kept = history(*(Warned(message=str(i)) for i in range(KEPT_MOMENTS + 30)))
    texts = [moment.text for moment in kept.timeline]
    assert (len(texts), kept.moments_left_out) == (KEPT_MOMENTS, 30)
    assert (texts[0], texts[-1]) == ("0", str(KEPT_MOMENTS + 29))


@given(length=st.integers(1, 50), count=st.integers(1, 50))
def test_stretches_are_even_and_leave_nothing_out(length, count):
    count = min(count, length)
    cut = stretches(range(length), count)
    assert [item for stretch in cut for item in stretch] == list(range(length))
    assert len(cut) == count
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
