"""Live runs and readings of machines, made up for the tests of what is served."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.redaction import Redaction
from lora_trainer.run.events import Failed, PhaseChanged, RanksMeasured, Restarted, Warned
from lora_trainer.run.silence import Silence
from lora_trainer.serve.gauges import Gauges, GpuReading, HostReading, Reading
from lora_trainer.serve.run_state import RunState
from support.run_events import RUN, sample, saved, stepped

RANKS = [
    {"rank": rank, "seconds": 2.0, "tokens": 100, "memory_bytes": 7, "gpu_memory_bytes": 0}
    for rank in range(2)
]


def gauges_of() -> Gauges:
    """Return gauges of a machine with one GPU that does not tell all."""
    gauges = Gauges(Path())
    host = HostReading(1, 2, 3, 4, None, None, 5.0)
    gauges.keep(Reading(1.0, host, (GpuReading(0, "GPU", 1, 2, None, 40, 99.5),)))
    return gauges


def live_run(*events) -> RunState:
    """Return a run to which the events have happened, seen soon after."""
    live = RunState(Redaction(), clock=lambda: 100.0)
    live.silence = Silence(lambda: 0.0)
    for event in events:
        live.add(event)
    return live


def full_run() -> RunState:
    """Return a run in which everything happened that can."""
    live = live_run(
        *RUN,
        stepped(41, loss=float("nan")),
        saved(41),
        sample(41, "after"),
        RanksMeasured(time=42.0, step=41, ranks=RANKS, slowest=1),
        Warned(time=42.0, message="w"),
        PhaseChanged(time=42.0, phase="saving"),
        Restarted(time=42.0, attempt=1, cause="killed", exit_code=-9),
        Failed(time=42.0, exit_code=70, problems=[{"what": "x", "remedy": "y"}]),
    )
    live.add_log("a line\n")
    return live
