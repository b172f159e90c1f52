"""Made-up runs for the page: one that goes on, one that failed, one that is finished."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from lora_trainer.run.events import (
    Ended,
    Event,
    Failed,
    Finished,
    PhaseChanged,
    Planned,
    Restarted,
    Resumed,
    StepDone,
    Warned,
)
from support.run_events import evaluated, generated, sample, saved, started

TOTAL = 200
REMEDY = "./training/run.sh --learning_rate 5e-5"
HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script> \u202etxet'


def step(number: int, now: float, *, seconds: float = 0.5) -> StepDone:
    """Return a step with a loss that falls and wavers."""
    return StepDone(
        time=now, step=number, epoch=number / 50,
        loss=0.1 + 3 * math.exp(-number / 60) + 0.1 * math.sin(number),
        learning_rate=2e-4 * (1 - number / 1e6), grad_norm=1 + 0.5 * math.cos(number),
        step_seconds=seconds, tokens=900 + number % 7, trained_tokens=400,
        tokens_seen=900 * number, memory_bytes=2_100_000_000 + 1000 * number,
    )  # fmt: skip


def at(moment: float, *events: Event) -> list[Event]:
    """Return the events as of another moment."""
    return [replace(event, time=moment) for event in events]


def going_on(steps: int = 120, total: int = TOTAL, answer: str = "no idea") -> list[Event]:
    """Return a run at some step, restarted once at step 80, all well."""
    now = time.time()
    begun = now - steps / 2 - 30
    plan = {"total_steps": total, "device": "cpu", "precision": "float32", "attention": "sdpa"}
    events: list[Event] = [
        started(begun),
        Warned(time=begun, message="bf16 is emulated on this CPU: training in float32"),
        PhaseChanged(time=begun + 1, phase="loading", detail="embedded/SmolLM2-135M-Instruct"),
        Planned(time=begun + 5, plan=plan | {"reasons": ["padding-free: proven on the model"]}),
        *at(begun + 12, evaluated(0, 3.5), generated(0, "before", 0.0)),
        *at(begun + 19, sample(0, "before", answer, prompt=f"lamp on {answer}")),
        PhaseChanged(time=begun + 20, phase="training"),
    ]
    for number in range(1, steps + 1):
        then = now - (steps - number) / 2
        events.append(step(number, then))
        if number % (total // 5) == 0:
            held_out = evaluated(number, 0.1 + 3 * math.exp(-number / 55))
            events += at(then, held_out, saved(number, 0.2, 59_000_000))
        if number == 80:
            events += [
                Restarted(time=then, attempt=1, cause="was killed", exit_code=-9),
                started(then, attempt=1),
                Resumed(time=then, step=80, path="checkpoints/step-000080"),
                PhaseChanged(time=then, phase="training"),
            ]
    return events


def failed() -> list[Event]:
    """Return a run that failed with everything that can be said of it."""
    now = time.time()
    problem = {
        "what": "the loss is not finite",
        "where": "step 120, learning_rate (command line)",
        "why": "the gradient norm rose from 0.4 to 212 within 12 steps",
        "remedy": REMEDY,
    }
    return [
        *going_on(),
        Failed(time=now, exit_code=70, problems=[problem]),
        Ended(time=now, exit_code=70),
    ]


def finished(answer: str = "ON") -> list[Event]:
    """Return a run that is complete, with its results."""
    now = time.time()
    return [
        *going_on(TOTAL),
        *at(now, generated(TOTAL, "after", 0.75), sample(TOTAL, "after", answer, prompt="lamp on")),
        Finished(
            time=now, step=TOTAL, train_seconds=100.0, tokens_seen=180_000,
            peak_memory_bytes=2_400_000_000, results=["final_model"],
        ),
        Ended(time=now, exit_code=0),
    ]  # fmt: skip
