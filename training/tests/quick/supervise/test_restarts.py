"""Restarts are counted without progress in between, and never repeated at one place."""

from __future__ import annotations

from lora_trainer.run.status import RunStatus
from lora_trainer.supervise.restarts import RENEWING_STEPS, Restarts
from support.run_events import after, saved, started, stepped, training


def at(step: int, *more: object) -> RunStatus:
    return after(stepped(step), *more, status=training())


def ended(restarts: Restarts, *statuses: RunStatus) -> list[str]:
    """Return what is said of each end in turn; only a worker that may restart does."""
    refusals = []
    for status in statuses:
        refusals.append(restarts.refusal(status))
        if not refusals[-1]:
            restarts.take(status)
    return refusals


def test_ends_far_apart_never_use_up_the_restarts():
    far = [at(step * RENEWING_STEPS) for step in range(1, 20)]
    assert set(ended(Restarts(1), *far)) == {""}


def test_ends_close_together_use_them_up():
    *allowed, last = ended(Restarts(2), at(41), at(43), at(45))
    assert allowed == ["", ""]
    assert "restarted 2 times without progress" in last


def test_a_checkpoint_in_between_is_progress():
    near = [at(step, saved(step)) for step in range(41, 51)]
    assert set(ended(Restarts(1), *near)) == {""}


def test_a_checkpoint_saved_again_is_none():
    again = [at(41, saved(40)), at(42, saved(40)), at(43, saved(40))]
    assert [bool(one) for one in ended(Restarts(1), *again)] == [False, True, True]


def test_two_ends_at_one_step_are_the_last_whatever_the_count():
    assert ended(Restarts(9), at(41), at(41))[-1] == "it ended at step 41 twice in a row"


def test_an_end_while_loading_is_not_at_the_step_before():
    loading = after(started(attempt=1), status=at(41))
    assert ended(Restarts(9), at(41), loading) == ["", ""]
    assert ended(Restarts(9), loading, loading)[-1]


def test_without_restarts_the_first_end_is_the_last():
    assert ended(Restarts(0), at(41))[-1]
