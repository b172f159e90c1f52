"""Prepare data for training: read, convert, tokenize, audit, cache; and choose the splits.

    sources --read--> rows --chunks, on all cores--> tokens --in order--> cache entry

`prepare` opens the cache entry for exactly these sources, tokenizer, template and settings, or
creates it. The entry has the same bytes whatever the number of processes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import DataError, TrainerError
from .bad_rows import BadRow, BadRowLog, BadRowPolicy, Row
from .cache import CacheFault, CacheWriter, TokenizedDataset, cache_key, new_entry, open_entry
from .columns import FORMATS, FormatName, check_columns
from .encoder import ChunkSettings, EncodedChunk, EncoderFactory, TooLong, encode_chunk
from .fingerprint import FileHashes, stamp_of
from .formats import ROWS_TO_DETECT, detect_format, unused_fields
from .hub import hub_fingerprint, open_hub_dataset
from .read import reading_faults, rows_of_files, rows_of_hub
from .resolve import DataFile, SourceSpec, hub_id, locate
from .row_counts import DataReport, Tally, report_on
from .split import Index, rows_not_in, split_rows
from .tokenizer_pool import EncodingPool, Task

CHUNK_ROWS = 512
CHUNK_BYTES = 500_000
IN_PROCESS_ROWS = 2_000
"""Up to this many rows, starting processes (1 to 2 s) takes longer than it saves."""
MOST_PROCESSES = 9
"""The default limit. Each takes 0.1 GB, and the total should stay below 1 GB; beyond about 12,
reading the rows (50 to 90 us each, in one process) is the bottleneck."""
ROWS_TO_LOOK_AT = 10_000
"""Maximum number of rows read to find good ones for format detection."""
MOST_UNUSED_NAMED = 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """User settings for rows: maximum length, and the handling of bad rows."""

    max_seq_length: int
    too_long: TooLong
    on_bad_rows: BadRowPolicy
    max_bad_rows_share: float


@dataclass(frozen=True, slots=True)
class DataSplits:
    """Tokenized training and evaluation data; the rows of each by index, in row order.

    With `eval_fraction` both indices point into the same dataset.
    """

    train: TokenizedDataset
    train_rows: Index
    train_report: DataReport
    eval: TokenizedDataset | None
    eval_rows: Index
    eval_report: DataReport | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A resolved dataset: its local files, or the opened hub dataset."""

    spec: SourceSpec
    files: tuple[DataFile, ...]
    hub_dataset: Any = None

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the rows, the first ones alone where the spec limits them."""
        rows = (
            rows_of_files(self.files, self.spec)
            if self.hub_dataset is None
            else rows_of_hub(self.hub_dataset, self.spec)
        )
        return islice(rows, self.spec.max_samples)

    def identity(self, hashes: FileHashes) -> dict[str, Any]:
        """Return everything the rows depend on."""
        identity: dict[str, Any] = {
            "format": self.spec.format,
            "columns": dict(self.spec.columns),
            "split": self.spec.split,
        }
        if self.spec.max_samples is not None:
            identity["max_samples"] = self.spec.max_samples
        if self.hub_dataset is not None:
            return {
                **identity,
                "hub": hub_id(self.spec),
                "content": hub_fingerprint(self.hub_dataset),
            }
        contents = []
        for file in self.files:
            with reading_faults(file.shown):
                contents.append([file.kind, file.is_gzip, hashes.sha256(file.path)])
        return {**identity, "content": contents}

    def stamps(self) -> list[tuple[int, ...]]:
        """Return a stamp that changes when a file is written."""
        stamps: list[tuple[int, ...]] = []
        for file in self.files:
            with reading_faults(file.shown):
                stamps.append(stamp_of(file.path.stat()))
        return stamps


def prepare(
    specs: Sequence[SourceSpec],
    *,
    encoder: EncoderFactory,
    settings: PrepareSettings,
    vocab_size: int,
    cache_dir: Path,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> tuple[TokenizedDataset, DataReport]:
    """Return the tokenized rows of datasets, from the cache if possible.

    `encoder` must be picklable: every process creates its own. `num_workers` 0 uses every core
    available to this process, up to nine. `progress` receives the number of rows done.

    Raises:
        DataError: no data, bad rows, invalid masks or too long rows, according to the settings.
        AccessError, UnavailableError, StorageError: a source or the cache cannot be accessed.
    """
    sources = _open_all(specs)
    stamps = [source.stamps() for source in sources]
    hashes = FileHashes(cache_dir)
    key = cache_key(
        {
            "sources": [source.identity(hashes) for source in sources],
            "encoder": encoder.digest,
            "vocab_size": vocab_size,
            "max_seq_length": settings.max_seq_length,
            "too_long": settings.too_long,
            "on_bad_rows": settings.on_bad_rows,
            "max_bad_rows_share": settings.max_bad_rows_share,
        }
    )
    hashes.save()
    how = "made"
    try:
        dataset = open_entry(cache_dir, key)
        if dataset is not None:
            return dataset, report_on(dataset, "reused")
    except CacheFault as fault:
        how = f"remade: {fault}"
    processes = num_workers or _default_processes()
    with new_entry(cache_dir, key, vocab_size) as writer:
        pool = EncodingPool(encoder, processes)
        counts = _tokenize(sources, encoder, settings, pool, writer, progress)
        if stamps != [source.stamps() for source in sources]:
            raise DataError.of(
                "a dataset changed while it was being read",
                where=", ".join(source.spec.path_or_id for source in sources),
                remedy="start again when it is complete",
            )
        writer.finish(key, counts)
    dataset = TokenizedDataset(cache_dir / key)
    return dataset, report_on(dataset, how, pool.restarts)


def prepare_splits(
    train_specs: Sequence[SourceSpec],
    eval_specs: Sequence[SourceSpec],
    eval_fraction: float,
    seed: int,
    **options: Any,
) -> DataSplits:
    """Prepare the training data and the held-out data; `options` are those of `prepare`.

    Held-out rows come from `eval_specs` or, without them, are `eval_fraction` of the training rows.
    Rows with the same content are never on both sides: they are left out of training, with a
    warning.

    Raises:
        DataError: no row is left on one side.
    """
    train, train_report = prepare(train_specs, **options)
    if not eval_specs:
        train_rows, eval_rows = split_rows(train.row_hashes, eval_fraction, seed)
        held_out = train if len(eval_rows) else None
        return DataSplits(train, train_rows, train_report, held_out, eval_rows, None, ())
    held_out, eval_report = prepare(eval_specs, **options)
    every = np.arange(len(train))
    train_rows = rows_not_in(train.row_hashes, every, held_out.row_hashes)
    repeated = len(every) - len(train_rows)
    if len(train_rows) == 0:
        raise DataError.of(
            "every training row is also in eval_dataset",
            remedy="use another eval_dataset, or set eval_fraction instead",
        )
    warning = f"{repeated:,} training rows are also in eval_dataset and are left out of training"
    return DataSplits(
        train,
        train_rows,
        train_report,
        held_out,
        np.arange(len(held_out)),
        eval_report,
        (warning,) if repeated else (),
    )


def formatted_rows(
    specs: Sequence[SourceSpec],
) -> Iterator[tuple[FormatName, Iterator[Row | BadRow]]]:
    """Yield each dataset's format and its rows, as `prepare` reads them."""
    for source in _open_all(specs):
        format, rows, _ = _with_format(source)
        yield format, rows


def _default_processes() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # available on Linux
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def _open_all(specs: Sequence[SourceSpec]) -> list[_Source]:
    """Resolve all sources, and report all missing ones at once."""
    sources: list[_Source] = []
    faults: list[TrainerError] = []
    for spec in specs:
        try:
            files = locate(spec)
            dataset = open_hub_dataset(spec) if files is None else None
            sources.append(_Source(spec, files or (), dataset))
        except TrainerError as fault:
            faults.append(fault)
    if faults:
        raise type(faults[0])([problem for fault in faults for problem in fault.problems])
    return sources


def _tokenize(
    sources: Sequence[_Source],
    encoder: EncoderFactory,
    settings: PrepareSettings,
    pool: EncodingPool,
    writer: CacheWriter,
    progress: Progress | None,
) -> dict[str, Any]:
    """Tokenize all sources into the cache; return the counts for the report."""
    tally = Tally(BadRowLog(settings.on_bad_rows, settings.max_bad_rows_share))
    formats: list[FormatName] = []
    unused: dict[str, None] = {}
    numbers: deque[int] = deque()

    def tasks() -> Iterator[Task]:
        for number, source in enumerate(sources):
            format, rows, left = _with_format(source)
            formats.append(format)
            unused.update(dict.fromkeys(left))
            chunk_settings = ChunkSettings(
                format, dict(source.spec.columns), settings.max_seq_length, settings.too_long
            )
            for chunk in _chunks(rows):
                numbers.append(number)
                # Once rejected, the rest is only counted, so that everything is reported at once.
                yield chunk, chunk_settings, tally.log.is_refused

    with closing(_encoded(tasks(), encoder, pool)) as chunks:
        for chunk in chunks:
            tally.add(chunk)
            source = numbers.popleft()
            if not tally.log.is_refused:
                writer.append(chunk.ids, chunk.loss_mask, chunk.lengths, chunk.row_hashes, source)
            if progress is not None:
                progress(tally.log.rows_read)
            if tally.is_hopeless:
                break
    tally.judge(writer.row_count)
    return {
        "rows_read": tally.log.rows_read,
        "rows_truncated": tally.truncated,
        "rows_skipped": dict(tally.log.reasons),
        "rows_dropped": dict(tally.dropped),
        "rows_changed": dict(sorted(tally.changes.items())),
        "unused_fields": list(unused)[:MOST_UNUSED_NAMED],
        "formats": formats,
        "longest_tokens": tally.longest,
    }


def _encoded(
    tasks: Iterator[Task], encoder: EncoderFactory, pool: EncodingPool
) -> Generator[EncodedChunk, None, None]:
    """Run tasks in order: in this process for a small dataset or a single core, else in a pool."""
    first: list[Task] = []
    count = 0
    for task in tasks:
        first.append(task)
        count += len(task[0])
        if count > IN_PROCESS_ROWS:
            break
    if count > IN_PROCESS_ROWS and pool.size > 1:
        with pool:
            yield from pool.encode(chain(first, tasks))
        return
    local = encoder()
    for rows, settings, is_check in chain(first, tasks):
        yield encode_chunk(rows, local, settings, is_check)


def _with_format(source: _Source) -> tuple[FormatName, Iterator[Row | BadRow], list[str]]:
    """Return a source's format, all its rows, and the fields that the format does not use.

    The first good rows decide.
    """
    rows = source.rows()
    looked_at: list[Row | BadRow] = []
    good: list[Row] = []
    for row in rows:
        looked_at.append(row)
        if isinstance(row, Row):
            good.append(row)
        if len(good) == ROWS_TO_DETECT or len(looked_at) == ROWS_TO_LOOK_AT:
            break
    spec = source.spec
    values = [row.value for row in good]
    assert spec.format in (*FORMATS, "auto"), "the config knows the formats"
    if spec.format != "auto":
        if good:
            check_columns(values, spec.columns, spec.path_or_id)
        format = cast(FormatName, spec.format)
    else:
        # Without a good row there is nothing to convert, and the bad ones are reported.
        format = detect_format(values, spec.columns, spec.path_or_id) if good else "text"
    return format, chain(looked_at, rows), unused_fields(values, format, spec.columns)


def _chunks(rows: Iterator[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    """Group rows into chunks small enough to bound the memory of those in flight."""
    chunk: list[Row | BadRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.bytes if isinstance(row, Row) else 0
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
