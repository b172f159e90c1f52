"""Read the lines of a dataset file as bytes or text; reject other encodings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ..errors import DataError
from ..host.quoting import shell_word
from .bad_rows import MAX_ROW_BYTES, BadRow, oversize_reason
from .encodings import DESCRIPTIONS, SAMPLE_BYTES, guess_encoding, holds_utf8
from .resolve import DataFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def iter_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, line) without a byte order mark; None for a line that is too long."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line.rstrip(b"\r\n")) < MAX_ROW_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW_BYTES)
        yield number, None


def decoded_lines(stream: BinaryIO, file: DataFile) -> Iterator[tuple[str, str] | BadRow]:
    """Yield (where, text) of each line that is not blank.

    Raises:
        DataError: the file is in another encoding.
    """
    decoder = LineDecoder(stream, file)
    for number, line in iter_lines(stream):
        where = f"{file.shown}:{number}"
        if line is None:
            yield BadRow(where, oversize_reason())
        elif line.strip():
            try:
                yield where, decoder.decode(line, number)
            except UnicodeDecodeError as error:
                yield BadRow(where, f"is not valid UTF-8, at byte {error.start + 1} of the line")


class LineDecoder:
    """Decodes lines; the first one that is not UTF-8 decides whether to reject the whole file."""

    def __init__(self, stream: BinaryIO, file: DataFile) -> None:
        self._stream = stream
        self._file = file
        self._is_utf8 = False

    def decode(self, line: bytes, number: int) -> str:
        """Return a line as text.

        Raises:
            UnicodeDecodeError: this line is not UTF-8, but others are.
            DataError: the file is in another encoding.
        """
        try:
            text = line.decode()
        except UnicodeDecodeError:
            if not self._is_utf8:
                self._refuse_other_encoding(line, number)
                self._is_utf8 = True
            raise
        self._is_utf8 = self._is_utf8 or not line.isascii()
        return text

    def _refuse_other_encoding(self, line: bytes, number: int) -> None:
        position = self._stream.tell()
        sample = line + self._stream.read(SAMPLE_BYTES)
        self._stream.seek(position)
        refuse_other_encoding(sample, self._file, number)


def refuse_other_encoding(sample: bytes, file: DataFile, number: int) -> None:
    """Reject a file whose text, from line `number` on, looks like another encoding.

    Raises:
        DataError: it does.
    """
    if holds_utf8(sample) or (encoding := guess_encoding(sample)) is None:
        return
    raise DataError.of(
        "the file is not UTF-8 text",
        where=f"{file.shown}:{number}",
        why=f"it looks like {encoding} ({DESCRIPTIONS[encoding]})",
        remedy=conversion(file, encoding),
    )


def conversion(file: DataFile, encoding: str) -> str:
    """Return the command that converts a file to UTF-8, beside the file itself."""
    source = shell_word(file.path)
    stem = file.path.name.removesuffix(".gz").removesuffix(f".{file.kind}")
    target = shell_word(file.path.with_name(f"{stem}.utf8.{file.kind}"))
    unpacked = f"gzip -dc {source} | " if file.is_gzip else ""
    named = "" if file.is_gzip else f" {source}"
    return f"{unpacked}iconv -f {encoding} -t UTF-8{named} > {target}"
