"""Stop signals of a command, from its first line to its exit code.

An exception that a signal handler raises may be swallowed: by an import, a destructor, a
callback. So there are three stages, one after the other:

1. `install`: nothing is open yet. A signal prints its block and ends the process at once.
2. `unwind`: a command has begun to change things. A signal raises KeyboardInterrupt and
   is remembered, so that a run that has not begun does not begin (`handled`).
3. `finish`: the exit code is settled; a signal ends the process with it.

Imports next to nothing: what runs before `install` is what a signal may still interrupt.
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

STOPS = (signal.SIGINT, signal.SIGTERM)
MEANINGS = {
    signal.SIGINT: (130, "interrupted before it began"),
    signal.SIGTERM: (143, "stopped by signal"),
}
received: list[int] = []  # the signals so far, by whichever stage
_is_installed = False


def install() -> None:
    """Answer stop signals from now on; those that are ignored, as by nohup, stay ignored."""
    global _is_installed  # noqa: PLW0603  signal handlers belong to the process
    _is_installed = True
    _set(_end_at_once)


def unwind() -> None:
    """Let a stop signal unwind the command from now on, where `install` was called."""
    if _is_installed:
        sys.unraisablehook = _report_unraisable
        _set(_raise)


def finish(exit_code: int) -> None:
    """Let a stop signal end the process with the exit code that is settled."""
    _set(lambda *_: os._exit(exit_code))


@contextlib.contextmanager
def handled(handler: Handler, numbers: Iterable[int]) -> Iterator[None]:
    """Give signals to the handler while a run goes on; after it they change nothing.

    Raises:
        KeyboardInterrupt: one has come before, and was swallowed by whatever it met.
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
    """Return the exit code and the last block of a command that a signal ended."""
    number = signal.Signals(received[0]) if received else signal.SIGINT
    code, meaning = MEANINGS[number]
    lines = (
        "stopped before it began; nothing was changed",
        "  where:  start of the command",
        f"  why:    received {number.name}",
        "  remedy: start the same command again",
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
    """Keep quiet of a KeyboardInterrupt that a callback swallowed: `handled` raises it again."""
    if not (received and isinstance(unraisable.exc_value, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the run is over, and what it ended with is on its way out."""
