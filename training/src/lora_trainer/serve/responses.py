"""The server's responses: a run's status, metrics and series as JSON values."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..run.status import RunStatus
from .gauges import Gauges
from .run_state import RunState

Answer = dict[str, Any]
POINT_COLUMNS = (
    "step", "epoch", "loss", "loss_min", "loss_max", "learning_rate", "grad_norm",
    "tokens_per_second", "memory_bytes", "gpu_memory_bytes",
)  # fmt: skip
EVAL_COLUMNS = ("step", "eval_loss", "eval_perplexity", "eval_token_accuracy")
GIGABYTE = 1e9


def health_view(live: RunState, gauges: Gauges) -> Answer:
    """Return what /health says."""
    judged = live.health()
    return {
        "status": judged.status,
        "cuda_available": gauges.has_gpu,
        "is_training": judged.is_training,
        "phase": live.status.phase,
        "reason": judged.reason,
        "remedy": judged.remedy,
        "seconds_since_progress": round(judged.seconds_since_progress, 3),
    }


def metrics_view(live: RunState, gauges: Gauges) -> Answer:
    """Return the figures of the moment; what is not known yet is None."""
    status = live.status
    latest, last_eval, best = status.latest, status.last_eval, status.best_eval
    host = gauges.latest.host if gauges.latest else None
    return {
        "current_step": status.step,
        "total_steps": status.total_steps,
        "last_loss": status.last_loss,
        "is_loss_finite": status.is_loss_finite,
        "is_training": status.is_training and not live.is_abandoned,
        "gpu_memory_allocated": (latest.gpu_memory_bytes if latest else 0) / GIGABYTE,
        "phase": status.phase,
        "epoch": latest.epoch if latest else 0.0,
        "learning_rate": latest.learning_rate if latest else None,
        "grad_norm": latest.grad_norm if latest else None,
        "loss_scale": latest.loss_scale or None if latest else None,
        "skipped_steps": latest.skipped_steps if latest else 0,
        "step_seconds": latest.step_seconds if latest else None,
        "tokens_per_second": status.tokens_per_second,
        "mean_tokens_per_second": status.mean_tokens_per_second,
        "tokens_seen": latest.tokens_seen if latest else 0,
        "eta_seconds": status.eta_seconds,
        "elapsed_seconds": status.elapsed_seconds,
        "eval_loss": last_eval.eval_loss if last_eval else None,
        "eval_perplexity": last_eval.eval_perplexity if last_eval else None,
        "eval_token_accuracy": last_eval.eval_token_accuracy if last_eval else None,
        "best_eval_loss": best.eval_loss if best else None,
        "memory_bytes": latest.memory_bytes if latest else 0,
        "gpu_memory_bytes": latest.gpu_memory_bytes if latest else 0,
        "peak_memory_bytes": status.peak_memory_bytes,
        "peak_gpu_memory_bytes": status.peak_gpu_memory_bytes,
        "checkpoints": len(status.checkpoints),
        "checkpoint_age_seconds": status.checkpoint_age_seconds(time.time()),
        "restarts": len(status.restarts),
        "warnings": sum(warning.count for warning in status.warnings),
        "host_memory_used_bytes": host.memory_used_bytes if host else None,
        "host_memory_limit_bytes": host.memory_limit_bytes if host else None,
        "disk_free_bytes": host.disk_free_bytes if host else None,
    }


def status_view(live: RunState, gauges: Gauges) -> Answer:
    """Return all that is known of the run and its machine."""
    status = live.status
    gpus = gpus_view(gauges)
    return {
        "is_running": not live.is_abandoned and (status.is_running or _is_beginning(live)),
        "gpu_count": len(gpus),
        "gpu_name": gpus[0]["name"] if gpus else None,
        "phase": status.phase,
        "detail": status.detail or live.detail,
        "run_name": status.run_name,
        "output_dir": status.output_dir,
        "config_digest": status.config_digest,
        "attempt": status.attempt,
        "pid": status.pid,
        "started_time": status.started_time,
        "last_time": status.last_time,
        "elapsed_seconds": status.elapsed_seconds,
        "paused_seconds": status.paused_seconds,
        "step": status.step,
        "total_steps": status.total_steps,
        "epoch": status.latest.epoch if status.latest else 0.0,
        "progress": _progress(status),
        "plan": dict(status.plan),
        **{key: status.plan.get(key) for key in ("device", "precision", "attention")},
        "checkpoints": [
            _picked(saved, ("step", "path", "bytes", "seconds", "is_best"))
            | {"time": saved.after.time if saved.after else None}
            for saved in status.checkpoints
        ],
        "restarts": [
            _picked(one, ("time", "attempt", "cause", "exit_code")) for one in status.restarts
        ],
        "warnings": [asdict(warning) for warning in status.warnings],
        "warnings_left_out": status.warnings_left_out,
        "evals": [_picked(one, (*EVAL_COLUMNS, "is_best")) for one in status.evals],
        "generated": {
            "before": _maybe(status.generated_before),
            "after": _maybe(status.generated_after),
        },
        "samples": [
            _picked(one, ("index", "step", "when", "prompt", "expected", "answer"))
            for one in live.samples()
        ],
        "resumed": _maybe(status.resumed),
        "failure": _failure(status),
        "finished": _maybe(status.finished),
        "exit_code": status.exit_code,
        "gpus": gpus,
        "host": host_view(gauges),
        "ranks": list(status.ranks),
        "slowest_rank": status.slowest_rank,
        "timeline": [moment._asdict() for moment in live.timeline()],
        "health": health_view(live, gauges),
    }


def history_view(live: RunState, gauges: Gauges, max_points: int) -> Answer:
    """Return the series behind the charts, each of at most so many points."""
    series = live.series(max_points)
    return {
        "points": _columns(series["points"], POINT_COLUMNS),
        "evals": _columns(_thinned(series["evals"], max_points), EVAL_COLUMNS),
        "resumes": series["resumes"][-max_points:],
        "hardware": hardware_view(gauges, max_points),
    }


def hardware_view(gauges: Gauges, max_points: int) -> Answer:
    """Return the machine's series."""
    kept = _thinned(gauges.readings(), max_points)
    indexes = sorted({gpu.index for reading in kept for gpu in reading.gpus})
    by_gpu = [{gpu.index: gpu for gpu in reading.gpus} for reading in kept]
    columns = (
        "memory_used_bytes", "utilization_percent", "temperature_celsius", "power_watts",
    )  # fmt: skip
    return {
        "time": [reading.time for reading in kept],
        "memory_used_bytes": [reading.host.memory_used_bytes for reading in kept],
        "cpu_percent": [reading.host.cpu_percent for reading in kept],
        "gpu": [
            {"index": index}
            | {name: [getattr(row.get(index), name, None) for row in by_gpu] for name in columns}
            for index in indexes
        ],
    }


def tick_view(live: RunState, gauges: Gauges) -> Answer:
    """Return what changes by itself: sent about once a second to every stream."""
    return {
        "health": health_view(live, gauges),
        "metrics": metrics_view(live, gauges),
        "host": host_view(gauges),
        "gpus": gpus_view(gauges),
    }


def gpus_view(gauges: Gauges) -> list[Answer]:
    """Return what each GPU is doing."""
    return [asdict(gpu) for gpu in gauges.latest.gpus] if gauges.latest else []


def host_view(gauges: Gauges) -> Answer | None:
    """Return what the host is doing, None before it was first read."""
    return asdict(gauges.latest.host) if gauges.latest else None


def _is_beginning(live: RunState) -> bool:
    return live.status.started_time is None


def _progress(status: RunStatus) -> Answer | None:
    return _picked(status.progress, ("done", "total", "unit")) if status.progress else None


def _failure(status: RunStatus) -> Answer | None:
    failure = status.failure
    return _picked(failure, ("exit_code", "problems")) if failure else None


def _maybe(value: Any) -> Answer | None:
    return None if value is None else asdict(value)


def _picked(value: object, names: Sequence[str]) -> Answer:
    return {name: getattr(value, name) for name in names}


def _columns(rows: Sequence[Any], names: Sequence[str]) -> Mapping[str, list[Any]]:
    return {name: [_number(getattr(row, name)) for row in rows] for name in names}


def _number(value: object) -> Any:
    """Return a figure in six digits, which no chart can tell from more."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value


def _thinned(rows: Sequence[Any], max_points: int) -> Sequence[Any]:
    """Return at most so many rows, evenly spaced, the last one among them."""
    if len(rows) <= max_points:
        return rows
    step = (len(rows) - 1) / max(1, max_points - 1)
    return [rows[round(len(rows) - 1 - step * back)] for back in range(max_points - 1, -1, -1)]
