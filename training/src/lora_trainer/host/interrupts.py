"""Handle stop signals from a command's first line to its exit code.

An exception raised in a signal handler may be swallowed by an import, a destructor or a callback.
So there are three stages:

1. `install`: nothing has started yet. A signal prints its block and ends the process at once.
2. `unwind`: the command has started to change things. A signal raises KeyboardInterrupt and is
recorded, so that a run that has not started does not start (`handled`).
3. `finish`: the exit code
is final; a signal ends the process with it.

Imports almost nothing: until `install` runs, a signal still kills the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MEANINGS = {
    signal.SIGINT: (130, "interrupted before the run began"),
    signal.SIGTERM: (143, "stopped by signal"),
    signal.SIGUSR1: (143, "stopped by signal"),
}
received: list[int] = []  # the signals received so far, in any stage
_is_installed = False


def install() -> None:
    """Handle stop signals from now on; ignored ones, as under nohup, stay ignored."""
    global _is_installed  # noqa: PLW0603  signal handlers belong to the process
    _is_installed = True
    _set(_end_at_once)


def unwind() -> None:
    """From now on a stop signal unwinds the command, if `install` was called."""
    if _is_installed:
        sys.unraisablehook = _report_unraisable
        _set(_raise)


def finish(exit_code: int) -> None:
    """From now on a stop signal ends the process with its final exit code."""
    _set(lambda *_: os._exit(exit_code))


@contextlib.contextmanager
def handled(handler: Handler, numbers: Iterable[int]) -> Iterator[None]:
    """Pass signals to the handler during a run; afterwards they have no effect.

    Raises:
        KeyboardInterrupt: one arrived earlier and was swallowed.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        if received:
            raise KeyboardInterrupt
        yield
    finally:
        for number, previous in before.items():
            is_over = _is_installed and not received
            signal.signal(number, _pass_over if is_over else previous)


def block() -> tuple[int, str]:
    """Return the exit code and the final error block of a command ended by a signal."""
    number = signal.Signals(received[0]) if received else signal.SIGINT
    code, meaning = MEANINGS[number]
    lines = (
        "stopped before the run began; nothing was changed",
        "  where:  start of the command",
        f"  why:    received {number.name}",
        "  remedy: run the same command again",
        f"exit code {code} ({meaning})",
    )
    return code, "\n".join(lines)


def _set(handler: Handler) -> None:
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    received.append(number)
    code, text = block()
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
    os._exit(code)


def _raise(number: int, _frame: FrameType | None) -> None:
    received.append(number)
    raise KeyboardInterrupt


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Do not print a KeyboardInterrupt swallowed by a callback: `handled` raises it again."""
    if not (received and isinstance(unraisable.exc_value, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the run is over and the process is exiting."""
