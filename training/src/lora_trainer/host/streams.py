"""Output streams of this process that redact secrets, whoever prints.

`redacted` replaces standard output and standard error, so that messages, tracebacks and library
warnings all pass through it. A full disk or a closed terminal loses text but never changes the exit
code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from ..redaction import Redaction
from .mounts import on_host


class RedactedStream:
    """A text stream that redacts secrets from everything written to it.

    Text that a full disk rejects is lost, and `error` keeps the reason. A closed pipe raises, which
    ends a command that only prints.
    """

    def __init__(self, stream: TextIO, redaction: Redaction) -> None:
        self.redaction = redaction
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without secrets, with the host's paths."""
        with self._losing():
            self._stream.write(on_host(self.redaction.text(text)))
        return len(text)

    def flush(self) -> None:
        """Flush buffered text."""
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.error = self.error or error

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line without secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would bypass redaction
            raise AttributeError(name)
        return getattr(self._stream, name)


@contextlib.contextmanager
def redacted(redaction: Redaction) -> Iterator[RedactedStream]:
    """Redact secrets from everything printed; yield the replacement of standard output."""
    before = sys.stdout, sys.stderr
    out, err = (RedactedStream(one, redaction) for one in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before


def strike(redaction: Redaction) -> None:
    """Use this redaction from now on, if `redacted` is active."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RedactedStream):
            stream.redaction = redaction


def say(text: str, stream: TextIO | None = None) -> None:
    """Print to standard output or another stream; ignore a stream that cannot be written."""
    stream = stream or sys.stdout
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


def complain(text: str) -> None:
    """Print to standard error; ignore it if it cannot be written."""
    say(text, sys.stderr)


def silence() -> None:
    """Print nothing more from this process; those that it starts have its streams as before."""
    nowhere = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    sys.stdout = sys.stderr = nowhere


def let_go() -> None:
    """Let the interpreter exit with its code: on a full disk it would be 120 or worse."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except ValueError:  # closed
            continue
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
