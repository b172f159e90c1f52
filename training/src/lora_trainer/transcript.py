"""What a run prints, kept in a file too: LORA_TRAINER_LOG_DIR/<run_name>.log.

A container's own log goes when the container goes; this folder is a mount. A folder that
cannot be written costs the file and never the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from .display import Display
from .errors import TrainerError
from .events import Event
from .status import RunStatus

VARIABLE = "LORA_TRAINER_LOG_DIR"


class Transcript:
    """A display on a file; none where the variable is not set."""

    def __init__(self, environ: Mapping[str, str], run_name: str, logging_steps: int) -> None:
        folder = environ.get(VARIABLE, "").strip()
        self._file = None
        self._display: Display | None = None
        if not folder:
            return
        try:
            self._file = (Path(folder) / f"{run_name}.log").open("a", encoding="utf-8")
        except OSError:
            return
        self._display = Display(self._file, logging_steps)

    def __enter__(self) -> Transcript:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if self._display is None or self._file is None:
            return
        self._display.close()
        with self._file as file:
            if isinstance(error, TrainerError):
                file.write(f"\n{error.block()}\n")

    def show(self, event: Event, status: RunStatus) -> None:
        """Show an event and the status after it."""
        if self._display is not None:
            self._display.show(event, status)

    def note(self, text: str) -> None:
        """Add a line."""
        if self._display is not None:
            self._display.note(text)
