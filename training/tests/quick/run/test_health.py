"""A run that is not well says why, and one that is well is left alone."""

import math

import pytest

from lora_trainer.run.events import (
    Ended,
    Failed,
    PhaseChanged,
    Progress,
    Restarted,
    Stopped,
    Warned,
)
from lora_trainer.run.health import health, stall_timeout
from lora_trainer.run.status import RunStatus
from support.run_events import after, saved, started, stepped, training

PROBLEM = [{"what": "row 3 is broken", "remedy": "mend row 3"}]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([stepped(4, loss=math.nan)], "not finite at step 4"),
        ([stepped(4, loss=math.inf)], "not finite"),
        ([Restarted(time=3.0, attempt=1, cause="killed", exit_code=137)], "worker ended (killed)"),
        ([Failed(time=3.0, exit_code=65, problems=PROBLEM)], "row 3 is broken"),
        ([Ended(time=3.0, exit_code=70)], "exit code 70: internal fault"),
    ],
)
def test_a_fault_is_unhealthy_with_its_reason(events, reason):
    state = health(after(*events, status=training()), 5.0, 100.0)
    assert state.status == "unhealthy"
    assert reason in state.reason
    assert state.remedy


@pytest.mark.parametrize(
    "last", [Stopped(time=3.0, step=3, signal="SIGTERM"), Ended(time=3.0, exit_code=0)]
)
def test_a_run_that_is_over_in_peace_stays_healthy(last):
    state = health(after(last, status=training()), 1e6, 10.0)
    assert (state.status, state.is_training) == ("healthy", False)


def test_a_restarted_worker_is_healthy_again_with_its_first_word():
    down = after(Restarted(time=3.0, attempt=1, cause="killed", exit_code=137), status=training())
    begun = after(started(4.0, attempt=1), status=down)
    assert health(begun, 5.0, 100.0).status == "unhealthy"
    back = after(PhaseChanged(time=4.5, phase="starting"), status=begun)
    assert health(back, 5.0, 100.0).status == "healthy"


def test_a_failure_brings_its_own_remedy():
    failed = Failed(time=3.0, exit_code=65, problems=PROBLEM)
    assert health(after(failed, status=training()), 5.0, 100.0).remedy == "mend row 3"


def test_silence_beyond_the_limit_is_unhealthy():
    assert health(training(), 3.0 + 99, 100.0).status == "healthy"
    state = health(training(), 3.0 + 101, 100.0)
    assert (state.status, state.seconds_since_progress) == ("unhealthy", 101)


@pytest.mark.parametrize("event", [Warned(time=90.0, message="again"), Progress(time=90.0, done=4)])
def test_talk_without_progress_does_not_hide_a_stall(event):
    status = after(Progress(time=3.0, done=4), event, status=training())
    assert health(status, 103.5, 100.0).status == "unhealthy"


def test_a_clock_behind_the_last_event_is_no_stall():
    assert health(training(), -1e6, 10.0).seconds_since_progress == 0


def test_nothing_known_yet_is_healthy():
    assert health(RunStatus(), 1e9, 10.0).status == "healthy"


def test_a_disk_too_small_for_the_next_checkpoint_is_unhealthy():
    status = after(saved(3, size=1000), status=training())
    assert health(status, 3.0, 100.0, free_disk_bytes=1000).status == "healthy"
    assert "the disk has 999 free bytes" in health(status, 3.0, 100.0, free_disk_bytes=999).reason


def test_the_measured_stall_limit_grows_with_the_step_time():
    slow = after(stepped(1), stepped(2, seconds=60.0), stepped(3))
    assert stall_timeout(slow, 0) == 20 * 60
    assert stall_timeout(slow, 5) == 5


def test_the_limit_of_short_steps_is_a_minute_and_of_other_phases_half_an_hour():
    quick = after(*(stepped(n, seconds=0.026) for n in range(1, 5)))
    assert stall_timeout(quick, 0) == 60
    for phase in ("evaluating", "saving", "exporting"):
        assert stall_timeout(after(PhaseChanged(phase=phase), status=quick), 0) == 1800


def test_a_silent_download_is_given_half_an_hour():
    assert stall_timeout(after(PhaseChanged(phase="loading")), 0) == 1800
