"""The status of a run follows from its events alone, across resumes and restarts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.run.events import (
    Ended,
    Failed,
    Finished,
    PhaseChanged,
    Planned,
    Progress,
    Restarted,
    Resumed,
    StepDone,
    Warned,
)
from lora_trainer.run.status import (
    KEPT_CHARACTERS,
    KEPT_EVENTS,
    RECENT_STEPS,
    RunStatus,
    fold,
    replay,
)
from support.run_events import (
    after,
    evaluated,
    generated,
    sample,
    saved,
    started,
    stepped,
    training,
)


def test_a_recorded_run_replays_to_the_same_status():
    events = [
        started(), PhaseChanged(time=0.5, phase="loading"),
        Planned(time=0.6, plan={"total_steps": 4}),
        evaluated(0, 3.0), stepped(1), stepped(2), saved(2), Warned(time=2.5, message="w"),
        Restarted(time=3.0, attempt=1, cause="killed", exit_code=137), started(3.1, attempt=1),
        Resumed(time=3.2, step=2, path="c/2"), stepped(3, 4.0), stepped(4, 5.0), evaluated(4, 1.0),
        Finished(
            time=6.0, step=4, train_seconds=5.0, tokens_seen=400, peak_memory_bytes=600, results=[]
        ),
        Ended(time=7.0, exit_code=0),
    ]  # fmt: skip
    assert replay(event.to_line() for event in events) == after(*events)


def test_a_torn_last_line_changes_nothing():
    lines = [started().to_line(), stepped(1).to_line()]
    assert replay([*lines, stepped(2).to_line()[:40]]) == replay(lines)


def test_folding_leaves_the_earlier_status_as_it_was():
    before = training(2)
    fold(before, stepped(3))
    assert before == training(2)


def test_a_step_gives_the_figures_of_the_run():
    status = training(3, total_steps=10)
    assert (status.phase, status.step, status.total_steps) == ("training", 3, 10)
    assert (status.last_loss, status.latest.epoch, status.latest.tokens_seen) == (1.0, 0.3, 300)


def test_speed_is_that_of_the_recent_steps():
    slow_then_fast = [
        stepped(i, seconds=10.0 if i <= 5 else 2.0) for i in range(1, 6 + RECENT_STEPS)
    ]
    assert after(*slow_then_fast).tokens_per_second == pytest.approx(50)


def test_the_first_step_of_a_process_does_not_count_for_speed():
    assert after(stepped(1, seconds=60.0), stepped(2, seconds=2.0)).tokens_per_second == 50
    assert after(stepped(1, seconds=50.0)).tokens_per_second == 2


def test_time_left_counts_steps_evaluations_and_what_checkpoints_hold_up():
    status = training(4, total_steps=10, eval_every_steps=2, save_every_steps=5)
    status = after(
        evaluated(4, 1.0, seconds=7.0), saved(4, seconds=9.0, wait_seconds=0.5), status=status
    )
    assert status.eta_seconds == pytest.approx(6 * 1.0 + 3 * 7.0 + 2 * 0.5)


def test_time_left_is_unknown_before_a_step_and_after_the_end():
    assert after(Planned(plan={"total_steps": 5})).eta_seconds is None
    assert after(Ended(exit_code=0), status=training(5, total_steps=5)).eta_seconds is None


def test_the_best_evaluation_is_the_lowest_finite_one():
    status = after(*(evaluated(i, loss) for i, loss in enumerate([3.0, 1.0, math.nan, 2.0])))
    assert (status.best_eval.step, status.last_eval.step, status.eval_before.step) == (1, 3, 0)


def test_resuming_forgets_what_came_after_the_checkpoint():
    status = after(
        stepped(1), stepped(2), evaluated(2, 2.0), saved(2), stepped(3), stepped(4),
        evaluated(4, 1.0), saved(4), sample(4, "after"), Resumed(step=2, path="c/2"),
    )  # fmt: skip
    assert (status.step, status.best_eval.step, status.last_eval.step) == (2, 2, 2)
    assert [checkpoint.step for checkpoint in status.checkpoints] == [2]
    assert status.samples == ()


def test_resuming_brings_back_the_figures_at_the_checkpoint():
    status = after(
        stepped(1, loss=3.0), saved(1), stepped(2, loss=math.nan), Resumed(step=1, path="c")
    )
    assert (status.last_loss, status.is_loss_finite) == (3.0, True)


def test_a_run_that_begins_anew_forgets_its_checkpoints():
    status = after(stepped(1), stepped(2), saved(2), started(9.0), stepped(1, 10.0))
    assert (status.step, status.checkpoints) == (1, ())


def test_another_config_in_the_same_folder_starts_from_nothing():
    assert after(started(), stepped(1), started(5.0, digest="d2")) == after(
        started(5.0, digest="d2")
    )


def test_peaks_survive_a_restart():
    status = after(
        stepped(1, memory=9), Restarted(attempt=1, cause="c", exit_code=1), stepped(2, memory=5)
    )
    assert status.peak_memory_bytes == 9


def test_restarts_are_kept_with_their_causes():
    status = after(Restarted(attempt=1, cause="killed for memory", exit_code=137))
    assert [(r.attempt, r.cause) for r in status.restarts] == [(1, "killed for memory")]


def test_a_repeated_warning_is_counted_once():
    status = after(*[Warned(message="same")] * 3)
    assert [(w.message, w.count) for w in status.warnings] == [("same", 3)]


def test_endless_different_warnings_are_only_counted():
    status = after(*(Warned(message=str(i)) for i in range(KEPT_EVENTS + 7)))
    assert (len(status.warnings), status.warnings_left_out) == (KEPT_EVENTS, 7)


def test_a_status_stays_small_in_a_long_run():
    status = RunStatus()
    for i in range(1, 1000):
        status = after(stepped(i), evaluated(i, 1 / i), saved(i), status=status)
    assert len(status.recent) == RECENT_STEPS
    assert {len(status.evals), len(status.bests), len(status.checkpoints)} == {KEPT_EVENTS}


def test_a_huge_answer_is_kept_in_part():
    status = after(sample(0, "before", "x" * 10**6))
    assert len(status.samples[0].answer) == KEPT_CHARACTERS


def test_a_sample_that_is_sent_again_replaces_the_first():
    status = after(sample(0, "before", "1"), sample(0, "before", "2"))
    assert [s.answer for s in status.samples] == ["2"]


def test_before_and_after_are_kept_apart():
    before, later = generated(0, "before", 0.0), generated(9, "after", 1.0)
    status = after(before, later)
    assert (status.generated_before, status.generated_after) == (before, later)


def test_resume_goes_back_to_a_step_whose_checkpoint_was_reported_after_later_ones():
    at_boundary = PhaseChanged(phase="saving", detail="step 2")
    status = after(
        stepped(1), stepped(2, loss=1.5), at_boundary, stepped(3), stepped(4), saved(2), stepped(5),
        Resumed(step=2, path="c/2"),
    )  # fmt: skip
    assert (status.step, status.last_loss) == (2, 1.5)


def test_a_new_phase_begins_without_progress():
    status = after(Progress(done=5, total=9, unit="rows"), PhaseChanged(phase="evaluating"))
    assert (status.phase, status.progress) == ("evaluating", None)


def test_a_run_that_has_finished_has_no_progress_of_its_last_phase():
    done = {"step": 4, "train_seconds": 5.0, "tokens_seen": 400, "peak_memory_bytes": 600}
    status = after(
        PhaseChanged(phase="evaluating", detail="answers after training"),
        Progress(done=1, total=6, unit="answers"),
        Finished(**done, results=[]),
    )
    assert (status.phase, status.detail, status.progress) == ("finished", "", None)


@pytest.mark.parametrize("phase", ["evaluating", "saving"])
def test_a_pause_between_steps_still_counts_as_training(phase):
    status = after(PhaseChanged(phase=phase), status=training(3, total_steps=10))
    assert status.is_training


def test_the_evaluation_after_the_last_step_is_no_training():
    status = after(PhaseChanged(phase="evaluating"), status=training(3, total_steps=3))
    assert (status.is_training, status.is_running) == (False, True)


def test_elapsed_time_leaves_out_the_time_between_two_runs():
    status = after(started(0.0), stepped(1, 10.0), started(1000.0), stepped(2, 1005.0))
    assert status.elapsed_seconds == 15


def test_a_clock_set_back_takes_no_time_away():
    assert after(started(100.0), stepped(1, 110.0), stepped(2, 50.0)).elapsed_seconds == 10


@pytest.mark.parametrize(("code", "phase"), [(0, "finished"), (143, "stopped"), (70, "failed")])
def test_the_exit_code_decides_the_last_phase(code, phase):
    assert after(started(), Ended(exit_code=code)).phase == phase


any_event = st.one_of(
    st.builds(started, st.floats(0, 100), st.integers(0, 2), st.sampled_from(["d1", "d2"])),
    st.builds(PhaseChanged, phase=st.sampled_from(["loading", "evaluating", "training", "saving"])),
    st.builds(stepped, st.integers(1, 9), st.floats(0, 100), st.floats(), st.floats(0, 5)),
    st.builds(evaluated, st.integers(0, 9), st.floats()),
    st.builds(saved, st.integers(1, 9)),
    st.builds(lambda step: Resumed(step=step, path="c"), st.integers(0, 9)),
    st.builds(lambda: Restarted(attempt=1, cause="c", exit_code=1)),
    st.builds(lambda plan: Planned(plan=plan), st.dictionaries(
        st.sampled_from(["total_steps", "eval_every_steps", "save_every_steps"]),
        st.none() | st.integers(-5, 20) | st.text() | st.floats())),
    st.builds(lambda code: Ended(exit_code=code), st.sampled_from([0, 70, 143])),
    st.builds(lambda: Failed(exit_code=65, problems=[])),
)  # fmt: skip


@given(events=st.lists(any_event, max_size=30))
def test_no_order_of_events_breaks_the_status(events):
    status = after(*events)
    steps = [e.step for e in events if isinstance(e, (StepDone, Resumed))]
    assert status.step in (0, *steps[-1:])
    assert all(saving.step <= status.step or saving.after is None for saving in status.checkpoints)
    assert status.eta_seconds is None or not status.eta_seconds < 0
