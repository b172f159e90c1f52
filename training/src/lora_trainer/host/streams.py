"""The way out of this process for text: streams that strike out secrets, whoever prints.

`redacted` puts one in place of standard output and one in place of standard error, so that
messages, tracebacks and the warnings of libraries all pass. A disk or a terminal that takes
nothing more costs the text and never the exit code.
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
    """A text stream that strikes secrets out of each piece of text written to it.

    What a full disk does not take is lost, and `error` is why. A reader that is gone is an
    error, by which a command ends that only prints.
    """

    def __init__(self, stream: TextIO, redaction: Redaction) -> None:
        self.redaction = redaction
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without secrets, with the host's names of paths."""
        with self._losing():
            self._stream.write(on_host(self.redaction.text(text)))
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
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
        if name == "buffer":  # bytes would pass unseen
            raise AttributeError(name)
        return getattr(self._stream, name)


@contextlib.contextmanager
def redacted(redaction: Redaction) -> Iterator[RedactedStream]:
    """Strike secrets out of what is printed; give what is in place of standard output."""
    before = sys.stdout, sys.stderr
    out, err = (RedactedStream(one, redaction) for one in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before


def strike(redaction: Redaction) -> None:
    """Strike out what this redaction knows from now on, where `redacted` is in force."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RedactedStream):
            stream.redaction = redaction


def say(text: str, stream: TextIO | None = None) -> None:
    """Print to standard output, or to another stream, if it takes anything."""
    stream = stream or sys.stdout
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


def complain(text: str) -> None:
    """Print to standard error, if it takes anything."""
    say(text, sys.stderr)


def let_go() -> None:
    """Let the interpreter end with its exit code: a full disk would make it 120 or worse."""
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
