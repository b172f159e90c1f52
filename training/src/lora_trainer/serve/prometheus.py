"""The metrics of a run in Prometheus' text format or OpenMetrics.

Names and units follow Prometheus' conventions: base units as suffixes (`_seconds`,
`_bytes`, `_ratio`), `_total` for what only grows, `_info` for labels. What is not known
has no sample, so that no chart shows a zero that was never measured.

Source: https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import generate_latest as text_format
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_format

from .. import __version__
from ..run.events import Phase
from ..run.status import RunStatus
from .gauges import Gauges
from .run_state import RunState

PREFIX = "lora_trainer"
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OFFERED = {
    "application/json": JSON_TYPE,
    "text/plain": TEXT_TYPE,
    "application/openmetrics-text": OPENMETRICS_TYPE,
}
Figure = tuple[str, str, float | int | None]


class Figures:
    """Collects the metrics of the moment, as prometheus-client asks for them."""

    def __init__(self, live: RunState, gauges: Gauges) -> None:
        self.live = live
        self.gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """Yield every metric that has a value."""
        status = self.live.status
        yield from _infos(status)
        phases = {phase: phase == status.phase for phase in get_args(Phase)}
        yield StateSetMetricFamily(f"{PREFIX}_phase", "What the run is doing", phases)
        yield from _gauges(
            [
                *self._health(),
                *_run(status, status.is_running and not self.live.is_abandoned),
                *_training(status),
                *self._host(),
            ]
        )
        for name, text, value in _counts(status):
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value)
        yield from self._gpus()
        yield from _ranks(status)

    def _health(self) -> list[Figure]:
        judged = self.live.health()
        return [
            ("healthy", "Whether /health answers 200", judged.status == "healthy"),
            (
                "progress_age_seconds",
                "Time since the run last made progress",
                judged.seconds_since_progress,
            ),
            ("training", "Whether the run is in training", judged.is_training),
        ]

    def _host(self) -> list[Figure]:
        host = self.gauges.latest.host if self.gauges.latest else None
        if host is None:
            return []
        return [
            (
                "host_memory_used_bytes",
                "Memory in use, within the cgroup's limit",
                host.memory_used_bytes,
            ),
            ("host_memory_limit_bytes", "Memory limit", host.memory_limit_bytes),
            ("host_cpu_ratio", "CPU utilization", host.cpu_percent / 100),
            ("disk_free_bytes", "Free disk space for outputs", host.disk_free_bytes),
            ("disk_size_bytes", "Size of the output disk", host.disk_total_bytes),
            ("shm_free_bytes", "Free space in /dev/shm", host.shm_free_bytes),
            ("shm_size_bytes", "Size of /dev/shm", host.shm_total_bytes),
        ]

    def _gpus(self) -> Iterator[Metric]:
        gpus = self.gauges.latest.gpus if self.gauges.latest else ()
        columns: list[tuple[str, str, Callable[[Any], float | None]]] = [
            ("gpu_memory_used_bytes", "GPU memory in use", lambda gpu: gpu.memory_used_bytes),
            ("gpu_memory_size_bytes", "GPU memory", lambda gpu: gpu.memory_total_bytes),
            (
                "gpu_utilization_ratio",
                "GPU utilization",
                lambda gpu: _ratio(gpu.utilization_percent),
            ),
            ("gpu_temperature_celsius", "GPU temperature", lambda gpu: gpu.temperature_celsius),
            ("gpu_power_watts", "GPU power draw", lambda gpu: gpu.power_watts),
        ]
        for name, text, value_of in columns:
            family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["gpu", "name"])
            for gpu in gpus:
                if (value := value_of(gpu)) is not None:
                    family.add_metric([str(gpu.index), gpu.name], value)
            if family.samples:
                yield family


def expose(live: RunState, gauges: Gauges, content_type: str) -> bytes:
    """Return all figures in one of the two formats."""
    make: Any = openmetrics_format if content_type == OPENMETRICS_TYPE else text_format
    exposed: bytes = make(Figures(live, gauges))
    return exposed


def negotiate(accept: str) -> str:
    """Return the content type that an Accept header prefers; JSON unless it asks otherwise.

    `*/*` and a browser's list mean JSON, because only Prometheus names its own formats.
    """
    best, chosen = 0.0, JSON_TYPE
    for part in accept.lower().split(","):
        name, *options = (word.strip() for word in part.split(";"))
        weight = next((_weight(option[2:]) for option in options if option.startswith("q=")), 1.0)
        if name in OFFERED and weight > best:
            best, chosen = weight, OFFERED[name]
    return chosen


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _infos(status: RunStatus) -> Iterator[Metric]:
    run = {
        "run_name": status.run_name,
        "config_digest": status.config_digest,
        "version": __version__,
    }
    yield InfoMetricFamily(f"{PREFIX}_run", "Run name and version", run)
    if status.plan:
        keys = ("device", "precision", "attention")
        plan = {key: str(status.plan.get(key, "")) for key in keys}
        yield InfoMetricFamily(f"{PREFIX}_plan", "Device, precision and attention", plan)


def _gauges(figures: Iterable[Figure]) -> Iterator[Metric]:
    for name, text, value in figures:
        if value is not None:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)


def _run(status: RunStatus, is_running: bool) -> list[Figure]:
    fraction = status.step / status.total_steps if status.total_steps else None
    return [
        ("running", "Whether the run is in progress", is_running),
        (
            "start_time_seconds",
            "Start time of the run, in seconds since the epoch",
            status.started_time,
        ),
        ("elapsed_seconds", "Elapsed time of the run", status.elapsed_seconds),
        ("remaining_seconds", "Estimated time left", status.eta_seconds),
        ("exit_code", "Exit code of the run", status.exit_code),
        ("step", "Completed optimizer steps; may decrease after a resume", status.step),
        ("planned_steps", "Planned optimizer steps", status.total_steps or None),
        ("progress_ratio", "Fraction of the steps completed", fraction),
        (
            "checkpoint_age_seconds",
            "Time since the newest checkpoint was saved",
            status.checkpoint_age_seconds(time.time()),
        ),
    ]


def _training(status: RunStatus) -> list[Figure]:
    figures: list[Figure] = []
    if (step := status.latest) is not None:
        figures += [
            ("epoch", "Passes over the data", step.epoch),
            ("loss", "Loss of the last step, per supervised token", step.loss),
            ("learning_rate", "Learning rate of the last step", step.learning_rate),
            ("gradient_norm", "Norm of the gradient before clipping", step.grad_norm),
            ("step_duration_seconds", "Duration of the last step", step.step_seconds),
            ("tokens_per_second", "Recent speed, all tokens", status.tokens_per_second),
            ("worker_memory_bytes", "Memory of the worker at the last step", step.memory_bytes),
            ("worker_gpu_memory_bytes", "GPU memory of the worker", step.gpu_memory_bytes),
            ("worker_memory_peak_bytes", "Peak so far", status.peak_memory_bytes),
            ("worker_gpu_memory_peak_bytes", "Peak so far", status.peak_gpu_memory_bytes),
        ]
        if step.loss_scale:
            figures.append(("loss_scale", "Loss scale in float16", step.loss_scale))
    if (held_out := status.last_eval) is not None:
        figures += [
            ("eval_loss", "Held-out loss", held_out.eval_loss),
            ("eval_perplexity", "Held-out perplexity", held_out.eval_perplexity),
            ("eval_token_accuracy_ratio", "Held-out accuracy", held_out.eval_token_accuracy),
        ]
    if (best := status.best_eval) is not None:
        figures.append(("best_eval_loss", "Lowest held-out loss", best.eval_loss))
    if status.checkpoints:
        saved = status.checkpoints[-1]
        figures += [
            ("checkpoint_step", "Step of the newest checkpoint", saved.step),
            ("checkpoint_size_bytes", "Size of the newest checkpoint", saved.bytes),
            ("checkpoint_duration_seconds", "Time to save it", saved.seconds),
        ]
    return figures


def _ranks(status: RunStatus) -> Iterator[Metric]:
    columns = [
        ("rank_tokens_per_second", "Speed of one process, without waiting"),
        ("rank_memory_bytes", "Memory of one process"),
        ("rank_gpu_memory_bytes", "GPU memory of one process"),
    ]
    for name, text in columns if status.ranks else ():
        family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["rank"])
        for number, figures in enumerate(status.ranks):
            rank = dict(figures)
            if rank.get("seconds"):
                rank["tokens_per_second"] = rank.get("tokens", 0) / rank["seconds"]
            if (value := rank.get(name.removeprefix("rank_"))) is not None:
                family.add_metric([str(number)], value)
        yield family


def _counts(status: RunStatus) -> list[tuple[str, str, float]]:
    skipped = status.latest.skipped_steps if status.latest else 0
    return [
        ("step_seconds", "Time spent in steps, including repeated ones", status.stepped_seconds),
        ("tokens", "Tokens processed, including repeated ones", status.stepped_tokens),
        ("skipped_steps", "Steps repeated at a lower loss scale (float16)", skipped),
        ("restarts", "Worker restarts", len(status.restarts)),
        ("warnings", "Warnings given", sum(warning.count for warning in status.warnings)),
    ]


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
