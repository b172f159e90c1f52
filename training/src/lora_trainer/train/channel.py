"""The worker's end of its supervisor: signals come in, events go out."""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
from collections.abc import Callable

from ..run.events import Event


class StopRequested(BaseException):
    """A signal came while nothing was worth saving."""


class StopFlag:
    """Whether a signal asked to stop; raises at once outside of training, waits inside."""

    def __init__(self) -> None:
        self.signal = ""
        self.step = 0  # the one that is saved
        self.is_deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        is_first, self.signal = not self.signal, signal.Signals(number).name
        if is_first and not self.is_deferred:
            raise StopRequested

    def is_set(self) -> bool:
        """Return whether to stop at the next step boundary."""
        return bool(self.signal)


class EventPipe:
    """Writes events to the supervisor from a thread of its own, so that no reader holds up a step.

    A supervisor that is gone is not an error.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._before_stop: Callable[[], None] = lambda: None
        self._writer = threading.Thread(target=self._write, name="events", daemon=True)
        self._writer.start()

    def emit(self, event: Event) -> None:
        """Hand over one event; never waits."""
        self._queue.put(event)

    def close(self) -> None:
        """Wait until all events are written."""
        self._queue.put(None)
        self._writer.join()

    def _write(self) -> None:
        """Write as long as somebody reads; stop the run as on a signal when nobody does."""
        try:
            with self._file:
                while (event := self._queue.get()) is not None:
                    self._file.write(event.to_line())
        except BrokenPipeError:
            self._stop()

    def _stop(self) -> None:
        self._before_stop()
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_without_reader(self, before_stop: Callable[[], None]) -> None:
        """Stop the run as on a signal once nobody reads, even if there is nothing to write."""
        self._before_stop = before_stop
        descriptor = self._file.fileno()

        def watch() -> None:
            poll = select.poll()
            poll.register(descriptor, 0)
            for _, event in poll.poll():
                if event & select.POLLERR:
                    self._stop()

        threading.Thread(target=watch, name="supervisor", daemon=True).start()
