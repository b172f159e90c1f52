"""Also keep console output in a file: LORA_TRAINER_LOG_DIR/<run_name>.log.

A container's log is removed with the container; this folder is a mount. If writing fails, the run
continues with a warning and its exit code does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO, cast

from ..errors import TrainerError
from ..host.streams import RedactedStream
from ..redaction import Redaction
from ..run.events import Event
from ..run.status import RunStatus
from .console import Display

VARIABLE = "LORA_TRAINER_LOG_DIR"


class Transcript:
    """A display on a file; none where the variable is not set. `warn` is called once at most."""

    def __init__(
        self,
        environ: Mapping[str, str],
        run_name: str,
        logging_steps: int,
        redaction: Redaction,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._warn = warn
        self._is_lost = False
        self._file: TextIO | None = None
        self._display: Display | None = None
        folder = environ.get(VARIABLE, "").strip()
        if not folder:
            return
        self._path = Path(folder) / f"{redaction.text(run_name)}.log"
        try:
            file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            self._lose(error)
            return
        self._file = cast(TextIO, RedactedStream(file, redaction))
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
        if self._display.error is not None:
            self._lose(self._display.error)
        try:
            try:
                if isinstance(error, TrainerError):
                    self._file.write(f"\n{error.block()}\n")
            finally:
                self._file.close()
        except OSError as fault:
            self._lose(fault)

    def show(self, event: Event, status: RunStatus) -> None:
        """Show an event and the status after it."""
        if self._display is not None:
            self._display.show(event, status)
            if self._display.error is not None:
                self._lose(self._display.error)

    def print_line(self, text: str) -> None:
        """Add a line."""
        if self._display is not None:
            self._display.print_line(text)

    def _lose(self, error: Exception) -> None:
        if not self._is_lost:
            self._is_lost = True
            why = getattr(error, "strerror", None) or str(error)
            self._warn(f"warning: the log {self._path} is not written: {why}")
