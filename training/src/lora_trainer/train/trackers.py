"""Trackers: figures of a run sent to TensorBoard, MLflow, trackio or W&B, through Accelerate.

A tracker never stops a run: one that fails, at its start or later, is reported once and disabled.
Missing packages are reported before anything is loaded (`missing_trackers`), so that `check` needs
no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from ..config.schema import SECRET_KEYS
from ..errors import Problem
from ..model.stacks import install_remedy
from ..redaction import Redaction

PROJECT = "lora-trainer"
# Name in report_to -> the module that has to be there, and what pip calls it.
PACKAGES = {
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "wandb": "wandb",
}
# A tracker of this run is found again by the id that it was given at the start.
IDS_FILE = "tracker-ids.json"


class Tracker(Protocol):
    """Where figures go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the figures of a step."""

    def close(self) -> None:
        """Send what is still held back, and end the record."""


class NullTracker:
    """Records nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Drop the figures."""

    def close(self) -> None:
        """Do nothing."""


def missing_trackers(report_to: Sequence[str]) -> list[Problem]:
    """Return a problem for each tracker whose package is not installed."""
    return [
        Problem(
            what=f"report_to: {name} is not installed",
            where="monitoring.report_to",
            why=f"the Python package {PACKAGES[name]} is not installed",
            remedy=f"remove {name} from report_to" + (f", or {add}" if add else ""),
        )
        for name in report_to
        if not _is_installed(PACKAGES[name])
        for add in (install_remedy(PACKAGES[name]),)
    ]


def open_trackers(
    report_to: Sequence[str],
    logging_dir: Path,
    run_name: str,
    config: Mapping[str, Any],
    *,
    first_step: int = 0,
    on_warning: Callable[[str], None] = lambda _: None,
) -> Tracker:
    """Open the trackers named in `report_to` for the run; call it on the main process only.

    `config` is logged as the run's settings: leaf name -> value, redacted by the caller.
    `first_step` is the step from which a resumed run logs again: TensorBoard then hides
    what an earlier attempt wrote from there on, the others continue their run by its id.
    """
    if not report_to:
        return NullTracker()
    from accelerate import PartialState

    PartialState()  # Accelerate's trackers ask it which process they are in
    settings = _settings(config)
    opened: list[_GuardedTracker] = []
    for name in report_to:
        try:
            with redirect_stdout(sys.stderr):
                inner = _START[name](logging_dir, run_name, settings, first_step)
        except Exception as error:
            on_warning(_warning(name, error))
        else:
            opened.append(_GuardedTracker(name, inner, on_warning))
    return _ManyTrackers(opened)


class _GuardedTracker:
    """One of Accelerate's trackers; after its first failure it records nothing more."""

    def __init__(self, name: str, inner: Any, on_warning: Callable[[str], None]) -> None:
        self._name = name
        self._inner = inner
        self._on_warning = on_warning

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._guard(lambda inner: inner.log(dict(metrics), step=step))

    def close(self) -> None:
        self._guard(lambda inner: inner.finish())
        self._inner = None

    def _guard(self, act: Callable[[Any], None]) -> None:
        if self._inner is None:
            return
        try:
            # Standard output is the worker's own; some trackers greet on it.
            with redirect_stdout(sys.stderr):
                act(self._inner)
        except Exception as error:
            self._inner = None
            self._on_warning(_warning(self._name, error))


class _ManyTrackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _start_tensorboard(folder: Path, run_name: str, settings: dict[str, Any], first: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Events of a killed attempt at `first` and later would stand beside the new ones.
    purge = {"purge_step": first} if (folder / run_name).is_dir() else {}
    tracker = TensorBoardTracker(run_name, folder, **purge)
    tracker.start()
    # As a text: hparams would put each attempt into a folder of its own, as one more run.
    lines = ["| key | value |", "| --- | --- |"]
    lines += [f"| {name} | `{value}` |" for name, value in settings.items()]
    tracker.log({"config": "\n".join(lines)}, step=first)
    return tracker


def _start_mlflow(folder: Path, run_name: str, settings: dict[str, Any], _: int) -> Any:
    from accelerate.tracking import MLflowTracker

    if not any(name in os.environ for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")):
        mlflow: Any = importlib.import_module("mlflow")
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    known = _read_ids(folder).get("mlflow")
    tracker = MLflowTracker(
        experiment_name=PROJECT,
        logging_dir=str((folder / "mlflow-artifacts").resolve()),
        run_id=known,
        run_name=run_name,
    )
    tracker.start()
    if known is None:
        tracker.store_init_configuration(settings)
        _write_id(folder, "mlflow", tracker.tracker.info.run_id)
    return tracker


def _start_trackio(folder: Path, run_name: str, settings: dict[str, Any], first: int) -> Any:
    # Read when trackio is imported; its default is a folder in the user's home.
    os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))
    from accelerate.tracking import TrackioTracker

    resume = "allow" if first else "never"
    tracker = TrackioTracker(PROJECT, name=run_name, resume=resume, config=settings)
    tracker.start()
    return tracker


def _start_wandb(folder: Path, run_name: str, settings: dict[str, Any], _: int) -> Any:
    from accelerate.tracking import WandBTracker

    wandb: Any = importlib.import_module("wandb")

    # Its banner would break the progress display, and left alone it sends along the
    # printed output, the source code, the git remote and the command line.
    private = wandb.Settings(
        silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_ids(folder).get("wandb")
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name,
        dir=str(folder),
        id=known,
        resume="allow",
        config=settings,
        settings=private,
    )
    tracker.start()
    _write_id(folder, "wandb", tracker.tracker.id)
    return tracker


_START: dict[str, Callable[[Path, str, dict[str, Any], int], Any]] = {
    "tensorboard": _start_tensorboard,
    "mlflow": _start_mlflow,
    "trackio": _start_trackio,
    "wandb": _start_wandb,
}


def _is_installed(module: str) -> bool:
    """Return whether a module could be imported, without importing it.

    A mere folder of that name, such as the `wandb/` that W&B leaves behind, is a
    namespace package without an origin and does not count.
    """
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config as trackers take it: plain scalars, no secret key."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in config.items()
        if name not in SECRET_KEYS
    }


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        ids = json.loads((folder / IDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def _write_id(folder: Path, name: str, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_read_ids(folder) | {name: run_id})
    beside = folder / f".{IDS_FILE}.tmp"
    beside.write_text(text, encoding="utf-8")
    beside.replace(folder / IDS_FILE)


def _warning(name: str, error: Exception) -> str:
    """Return why a tracker was left out, with no secret that its error may quote."""
    text = Redaction.of(os.environ).text(next(iter(str(error).splitlines()), ""))
    return f"tracker {name} failed and is disabled: {type(error).__name__}: {text}"
