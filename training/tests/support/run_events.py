"""Events of made-up runs, for the tests of what is made of them."""

from __future__ import annotations

from functools import reduce

from lora_trainer.run.events import (
    CheckpointSaved,
    Evaluated,
    Finished,
    Generated,
    PhaseChanged,
    Planned,
    RunStarted,
    Sample,
    StepDone,
)
from lora_trainer.run.status import RunStatus, fold


def started(time=0.0, attempt=0, digest="d1"):
    return RunStarted(
        time=time, run_name="demo", config_digest=digest, output_dir="out", attempt=attempt
    )


def stepped(step, time=None, loss=1.0, seconds=1.0, tokens=100, memory=2 * 10**9):
    return StepDone(
        time=float(step) if time is None else time, step=step, epoch=step / 10, loss=loss,
        learning_rate=1e-3, grad_norm=0.5, step_seconds=seconds, tokens=tokens,
        trained_tokens=tokens // 2, tokens_seen=step * tokens, memory_bytes=memory,
    )  # fmt: skip


def evaluated(step, loss, seconds=1.0):
    return Evaluated(
        time=float(step), step=step, eval_loss=loss, eval_perplexity=2 * loss,
        eval_token_accuracy=0.5, eval_tokens=10, eval_seconds=seconds,
    )  # fmt: skip


def generated(step, when, exact_match):
    return Generated(
        time=float(step), step=step, when=when, exact_match=exact_match, rows=8, seconds=1.0
    )


def saved(step, seconds=0.0, size=10, wait_seconds=0.0):
    return CheckpointSaved(
        time=float(step), step=step, path=f"c/{step}", bytes=size, seconds=seconds,
        wait_seconds=wait_seconds,
    )  # fmt: skip


def sample(step, when, answer="a", index=0, prompt="lamp on"):
    return Sample(
        time=float(step), step=step, when=when, index=index, prompt=prompt, expected="ON",
        answer=answer,
    )  # fmt: skip


def after(*events, status=None):
    """Return the status after the events."""
    return reduce(fold, events, status or RunStatus())


def training(steps=3, **plan):
    return after(started(), Planned(time=0.0, plan=plan), *(stepped(i + 1) for i in range(steps)))


START = started()
PLAN = Planned(time=0.0, plan={"total_steps": 40, "steps_per_epoch": 10})
DONE = Finished(
    time=99.0, step=40, train_seconds=61.0, tokens_seen=4000, peak_memory_bytes=3 * 10**9,
    results=["final_model", "report.html"],
)  # fmt: skip
RUN = [
    START, PLAN, generated(0, "before", 0.0), sample(0, "before", "no idea"), evaluated(0, 2.5),
    PhaseChanged(time=1.0, phase="training"), *(stepped(i) for i in range(1, 41)),
    evaluated(40, 0.25), generated(40, "after", 0.75), sample(40, "after", "ON"), DONE,
]  # fmt: skip
