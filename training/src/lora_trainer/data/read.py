"""Read datasets row by row: local files of every common kind, and the hub through `datasets`.

Memory stays bounded whatever a file's size, except for JSON arrays, which must be parsed whole. A
bad row is yielded as a finding with file and line; a bad file is raised as one error. Files of
every kind may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ..errors import AccessError, DataError, StorageError, TrainerError
from ..host.quoting import shell_word
from .bad_rows import MAX_ROW_BYTES, BadRow, Row, fault_in, measure, oversize_reason
from .json_rows import rows_of_json
from .lines import LineDecoder, decoded_lines, iter_lines
from .resolve import DataFile, FileKind, SourceSpec, locate
from .signature import GZIP, HEAD_BYTES, refuse_other_content

if TYPE_CHECKING:
    import pyarrow

ARROW_ROWS_AT_ONCE = 256


def iter_rows(spec: SourceSpec) -> Iterator[Row | BadRow]:
    """Yield the rows of a dataset in order, each usable or a finding that says why it is not.

    Raises:
        DataError: no such file, an unreadable file, or no rows.
        AccessError: a permission is missing.
        UnavailableError: the hub, or the dataset on it, cannot be reached.
    """
    files = locate(spec)
    if files is None:
        from .hub import open_hub_dataset

        return rows_of_hub(open_hub_dataset(spec), spec)
    return rows_of_files(files, spec)


def rows_of_files(files: Iterable[DataFile], spec: SourceSpec) -> Iterator[Row | BadRow]:
    """Yield the rows of local files, one file after the other."""
    return _judged((part for file in files for part in _read_file(file, spec)), spec)


def rows_of_hub(dataset: Any, spec: SourceSpec) -> Iterator[Row | BadRow]:
    """Yield the rows of an opened hub dataset."""
    from .hub import hub_batches

    return _judged(_arrow_rows(hub_batches(dataset), spec.path_or_id), spec)


def _judged(rows: Iterable[Row | BadRow], spec: SourceSpec) -> Iterator[Row | BadRow]:
    """Measure each row and find those unusable in any format."""
    has_rows = False
    for part in rows:
        has_rows = True
        if isinstance(part, BadRow):
            yield part
            continue
        size, fault = measure(part.value)
        yield BadRow(part.where, fault) if fault else Row(part.value, part.where, size)
    if not has_rows:
        raise DataError.of("the dataset is empty", where=spec.path_or_id)


def _read_file(named: DataFile, spec: SourceSpec) -> Iterator[Row | BadRow]:
    with _opened(named) as (stream, file):
        head = stream.read(HEAD_BYTES)
        stream.seek(0)
        refuse_other_content(head, file)
        if file.kind in ("parquet", "arrow"):
            yield from _arrow_rows(_arrow_batches(stream, file), file.shown)
        elif file.kind in ("csv", "tsv"):
            yield from _csv_rows(stream, file)
        elif file.kind == "txt":
            yield from _text_rows(stream, file)
        else:
            yield from rows_of_json(stream, file, spec.split)


@contextmanager
def _opened(file: DataFile) -> Iterator[tuple[BinaryIO, DataFile]]:
    """Open a file, decompressed if its content is gzipped, whatever its name."""
    with reading_faults(file.shown), file.path.open("rb") as raw:
        is_gzip = raw.read(len(GZIP)) == GZIP
        raw.seek(0)
        if file.is_gzip and not is_gzip:
            plain = file.path.with_name(file.path.name[: -len(".gz")])
            raise DataError.of(
                "the name ends in .gz, but the file is not gzipped",
                where=file.shown,
                remedy=f"mv {shell_word(file.path)} {shell_word(plain)}",
            )
        file = replace(file, is_gzip=is_gzip)
        if not is_gzip:
            yield raw, file
            return
        with gzip.open(raw) as unpacked:
            if file.kind not in ("parquet", "arrow"):
                yield cast(BinaryIO, io.BufferedReader(cast(Any, unpacked))), file
                return
            # These are read from their end: decompress to disk, not to memory.
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(unpacked, copy)
                copy.seek(0)
                yield cast(BinaryIO, copy), file


@contextmanager
def reading_faults(shown: str) -> Iterator[None]:
    """Turn every error of reading a dataset file into one of ours."""
    try:
        yield
    except TrainerError:
        raise
    except PermissionError as error:
        raise AccessError.of(
            "no permission to read a dataset file",
            where=shown,
            remedy=f"chmod a+r {shell_word(shown)}",
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError.of(
            "the gzip file is damaged or truncated",
            where=shown,
            remedy=f"check it (gzip -t {shell_word(shown)}), then download it again",
        ) from error
    except FileNotFoundError as error:
        raise DataError.of("a dataset file has disappeared", where=shown) from error
    except OSError as error:
        raise StorageError.of(
            "a dataset file cannot be read", where=shown, why=error.strerror or ""
        ) from error


def _text_rows(stream: BinaryIO, file: DataFile) -> Iterator[Row | BadRow]:
    for line in decoded_lines(stream, file):
        yield line if isinstance(line, BadRow) else Row(line[1].rstrip("\r\n"), line[0])


class _CsvLines:
    """The lines passed to the csv module; records whether one was too long."""

    def __init__(self, stream: BinaryIO, file: DataFile) -> None:
        self.lines = iter_lines(stream)
        self.decoder = LineDecoder(stream, file)
        self.number = 0
        self.is_oversized = False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        if line is None:
            self.is_oversized = True
            return "\n"
        try:
            return self.decoder.decode(line, self.number)
        except UnicodeDecodeError:
            # Invalid UTF-8 becomes surrogates, which `fault_in` reports by field.
            return line.decode(errors="surrogateescape")


def _csv_rows(stream: BinaryIO, file: DataFile) -> Iterator[Row | BadRow]:
    lines = _CsvLines(stream, file)
    # The csv module's limit is global; its default of 128 KiB rejects rows that we accept.
    csv.field_size_limit(MAX_ROW_BYTES)
    first_line = next(lines, "")
    if not first_line:
        return
    delimiter = _delimiter(first_line, file.kind)
    reader = csv.reader(itertools.chain([first_line], lines), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error:
        header = []
    if not any(header) or len(set(header)) < len(header) or any(fault_in(h) for h in header):
        raise DataError.of(
            "the first line is not a header: its column names are empty, repeated or not text",
            where=f"{file.shown}:1",
            remedy="put the column names, such as prompt,completion, on the first line",
        )
    while True:
        start = lines.number + 1
        try:
            fields = next(reader)
            fault = None
        except StopIteration:
            return
        except csv.Error:
            fields, fault = [], "invalid CSV: an unclosed quote or a stray line break"
        where = f"{file.shown}:{start}"
        if lines.is_oversized:
            lines.is_oversized = False
            fault = oversize_reason()
        if fault is None and fields and len(fields) != len(header):
            fault = f"has {len(fields)} fields, the header has {len(header)}"
        if fault is not None:
            yield BadRow(where, fault)
        elif fields:
            yield Row(dict(zip(header, fields, strict=True)), where)


def _delimiter(header_line: str, kind: FileKind) -> str:
    """Return the field delimiter; spreadsheets in much of Europe use `;` in .csv files."""
    if kind == "tsv":
        return "\t"
    if "," in header_line:
        return ","
    return next((mark for mark in (";", "\t") if mark in header_line), ",")


def _arrow_batches(stream: BinaryIO, file: DataFile) -> Iterator[pyarrow.RecordBatch]:
    """Yield the record batches of a Parquet or Arrow file (IPC file or stream)."""
    import pyarrow

    try:
        if file.kind == "parquet":
            from pyarrow import parquet

            yield from parquet.ParquetFile(stream).iter_batches(batch_size=ARROW_ROWS_AT_ONCE)
            return
        try:
            document = pyarrow.ipc.open_file(stream)
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            yield from pyarrow.ipc.open_stream(stream)
            return
        for index in range(document.num_record_batches):
            yield document.get_batch(index)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError.of(
            f"the file is not readable as {file.kind}",
            where=file.shown,
            why=f"{type(error).__name__} while decoding it",
            remedy="download or write it again: it is damaged, or its type does not match its name",
        ) from error


def _arrow_rows(
    batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], shown: str
) -> Iterator[Row | BadRow]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ARROW_ROWS_AT_ONCE):
            piece = batch.slice(start, ARROW_ROWS_AT_ONCE)
            for value in _python_rows(piece):
                number += 1
                where = f"{shown}: row {number}"
                yield BadRow(where, value) if isinstance(value, str) else Row(value, where)


def _python_rows(piece: Any) -> Iterator[dict[str, Any] | str]:
    """Yield rows as dicts, or the reason why a row cannot be converted."""
    try:
        values = piece.to_pylist()
    except (ValueError, OverflowError):  # invalid UTF-8, or a date outside Python's range
        if piece.num_rows > 1:
            for index in range(piece.num_rows):
                yield from _python_rows(piece.slice(index, 1))
        else:
            yield "a value is not valid UTF-8 or out of Python's range"
        return
    for row in values:
        yield {name: _without_missing(value) for name, value in row.items()}


def _without_missing(value: Any) -> Any:
    """Drop None from struct fields: Arrow adds the fields of other rows' structs."""
    if isinstance(value, dict):
        return {k: _without_missing(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_missing(part) for part in value]
    return value
