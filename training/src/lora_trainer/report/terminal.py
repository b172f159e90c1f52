"""Write to a terminal that may be slow, tiny or gone, without control sequences.

Text is written straight to the file descriptor: a terminal that is gone, full or stopped
(Ctrl-S) can neither raise into the run nor spoil the exit code at interpreter shutdown.
"""

from __future__ import annotations

import contextlib
import os
import select
import unicodedata
from typing import TextIO

from ..host.mounts import on_host

PATIENCE_SECONDS = 2.0  # a terminal that takes nothing for so long is given up
SHOWN_CHARACTERS = 500  # of a sample's text or a message


class Sink:
    """A text stream that never raises: what cannot be written is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: Exception | None = None  # why nothing more is written
        self._descriptor: int | None = None
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.is_dead = stream is None
        with contextlib.suppress(Exception):
            if stream is not None:
                stream.flush()
                # A descriptor of our own: the stream's may be closed and used again.
                self._descriptor = os.dup(stream.fileno())

    @property
    def is_unicode(self) -> bool:
        """Return whether bars and lines of Unicode can be shown."""
        return self.encoding.lower().startswith("utf")

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def size(self) -> tuple[int, int]:
        """Return columns and rows; 80 by 24 where there is no telling."""
        with contextlib.suppress(OSError):
            if self._descriptor is not None:
                size = os.get_terminal_size(self._descriptor)
                return size.columns or 80, size.lines or 24
        return 80, 24

    def write(self, text: str) -> int:
        """Write all of the text, with the host's names of paths, or drop it."""
        if not self.is_dead:
            try:
                # The descriptor goes past the stream, which may have secrets to strike out.
                if (redaction := getattr(self._stream, "redaction", None)) is not None:
                    text = redaction.text(text)
                self._write(on_host(text).encode(self.encoding, "backslashreplace"))
            except (OSError, ValueError, LookupError) as error:
                self.is_dead, self.error = True, error
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def close(self) -> None:
        """Give the descriptor back."""
        self.is_dead = True
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, data: bytes) -> None:
        if self._descriptor is None:
            assert self._stream is not None
            self._stream.write(data.decode(self.encoding))
            self._stream.flush()
            return
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # another process made the terminal non-blocking
                if not select.select([], [self._descriptor], [], PATIENCE_SECONDS)[1]:
                    return


def clean(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the text on one line, shortened, with all that could steer a terminal escaped."""
    return "".join(_visible(character) for character in shortened(text, limit))


def one_line(text: str) -> str:
    """Return the text cleaned, with its line breaks and other white space as single spaces."""
    return clean(" ".join(text.split()))


def shortened(text: str, limit: int) -> str:
    """Return at most so many characters, ending with dots where something is left out."""
    return text if len(text) <= limit else text[: max(0, limit - 3)] + "..."


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")
