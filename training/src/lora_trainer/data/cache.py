"""Cache of tokenized datasets on disk: written once, then memory-mapped by later runs.

A cache entry is a directory of plain little-endian arrays and a manifest:

    ids.bin              T token ids, uint16 where the vocabulary fits, else uint32
    trained.bin          T times uint8: whether the token is a target of the loss
    offsets.bin          N + 1 times int64: where each row begins
    trained_counts.bin   N times int32: supervised tokens of each row
    row_hashes.bin       N times uint64: equal for rows with the same content
    sources.bin          N times uint16: the index of the dataset of a row
    manifest.json        counts, types and sha256 of the above, and the data report

N rows, T tokens. Nothing is pickled. An entry gets its name only when complete; one that fails
verification is rebuilt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import AccessError, StorageError, TrainerError
from ..host.disk import follow_umask, sync
from ..host.scratch import release, scratch_folder

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
VERIFIED_BYTES = 500_000_000
"""Files up to this total size are verified by hash on opening (0.4 s), larger ones by size."""
TYPES = {
    "ids": ("<u2", "<u4"),
    "trained": ("|u1",),
    "offsets": ("<i8",),
    "trained_counts": ("<i4",),
    "row_hashes": ("<u8",),
    "sources": ("<u2",),
}


class CacheFault(ValueError):  # noqa: N818 - a finding, fixed by rebuilding the entry
    """A cache entry is damaged or from another version."""


class TokenizedDataset:
    """N tokenized rows, memory-mapped; rows are read from disk on access."""

    def __init__(self, directory: Path) -> None:
        """Open a cache entry.

        Raises:
            CacheFault: it is damaged or from another version.
        """
        self.directory = directory
        self.manifest = _verified_manifest(directory)
        arrays = {name: _mapped(directory, name, self.manifest) for name in TYPES}
        self._ids, self._trained = arrays["ids"], arrays["trained"]
        self._offsets = np.asarray(arrays["offsets"])
        _verify_shapes(arrays)
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        self.supervised_counts: NDArray[np.int32] = arrays["trained_counts"]
        self.row_hashes: NDArray[np.uint64] = arrays["row_hashes"]
        self.sources: NDArray[np.uint16] = arrays["sources"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return a row's token ids and which of them are trained, both of shape (T,)."""
        index = range(len(self))[index]  # rejects indices out of range, accepts -1
        row = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        ids = np.array(self._ids[row], dtype=np.int64)
        return ids, np.array(self._trained[row], dtype=np.bool_)

    @property
    def token_count(self) -> int:
        """Return the total number of tokens."""
        return int(self._offsets[-1])

    @property
    def digest(self) -> str:
        """Return a sha256 of the training content: ids, masks and row boundaries."""
        hashes = [self.manifest["files"][name]["sha256"] for name in ("ids", "trained", "offsets")]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def report(self) -> dict[str, Any]:
        """Return the data report stored with the rows."""
        report: dict[str, Any] = self.manifest["report"]
        return report


class CacheWriter:
    """Appends rows to a new cache entry; see `new_entry`."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.directory = directory
        self.types = {name: types[-1] for name, types in TYPES.items()}
        if vocab_size <= 1 << 16:
            self.types["ids"] = "<u2"
        self._streams: dict[str, BinaryIO] = {
            name: (directory / f"{name}.bin").open("wb") for name in TYPES
        }
        self._hashes = {name: hashlib.sha256() for name in TYPES}
        self._counts = dict.fromkeys(TYPES, 0)
        self._append("offsets", np.zeros(1))

    @property
    def row_count(self) -> int:
        """Return the number of rows appended so far."""
        return self._counts["row_hashes"]

    def append(
        self,
        ids: NDArray[Any],
        loss_mask: NDArray[Any],
        lengths: NDArray[Any],
        row_hashes: NDArray[Any],
        source: int,
    ) -> None:
        """Append rows: their concatenated tokens, and each row's length and hash.

        Raises:
            StorageError: the disk is full or writing failed.
        """
        assert len(ids) == len(loss_mask) == lengths.sum(), "tokens and lengths belong together"
        if len(lengths) == 0:
            return
        assert ids.max() <= np.iinfo(self.types["ids"]).max, "a token id beyond the vocabulary"
        limits = np.cumsum(lengths)
        counts = np.add.reduceat(loss_mask.astype(np.int64), limits - lengths)
        with _storage_faults(self.directory.parent):
            self._append("offsets", limits + self._counts["ids"])
            self._append("ids", ids)
            self._append("trained", loss_mask)
            self._append("trained_counts", counts)
            self._append("row_hashes", row_hashes)
            self._append("sources", np.full(len(lengths), source))

    def finish(self, key: str, report: Mapping[str, Any]) -> None:
        """Flush everything to disk, the manifest last.

        Raises:
            StorageError: the disk is full or writing failed.
        """
        files = {
            name: {
                "dtype": self.types[name],
                "count": self._counts[name],
                "sha256": self._hashes[name].hexdigest(),
            }
            for name in TYPES
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "files": files,
            "report": dict(report),
        }
        with _storage_faults(self.directory.parent):
            for stream in self._streams.values():
                stream.flush()
                os.fsync(stream.fileno())
            self.close()
            with (self.directory / MANIFEST).open("w", encoding="utf-8") as text:
                json.dump(manifest, text, indent=1)
                text.flush()
                os.fsync(text.fileno())
            sync(self.directory)

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            stream.close()

    def _append(self, name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values.astype(self.types[name])).tobytes()
        self._streams[name].write(data)
        self._hashes[name].update(data)
        self._counts[name] += len(values)


def cache_key(inputs: Mapping[str, Any]) -> str:
    """Return the name of the entry: a hash of everything its content depends on."""
    text = json.dumps({"format_version": FORMAT_VERSION, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_entry(cache_dir: Path, key: str) -> TokenizedDataset | None:
    """Open an entry, or return None where there is none.

    Raises:
        CacheFault: the entry is damaged.
    """
    directory = cache_dir / key
    return TokenizedDataset(directory) if directory.is_dir() else None


@contextmanager
def new_entry(cache_dir: Path, key: str, vocab_size: int) -> Iterator[CacheWriter]:
    """Yield a writer for an entry, which gets its name when the block ends without an error.

    Raises:
        StorageError: the disk is full or writing failed.
        AccessError: no permission to write to the cache.
    """
    with _storage_faults(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = contextlib.ExitStack()
        directory = unfinished.enter_context(scratch_folder(cache_dir, f"{key}.tmp-", "*.tmp-*"))
    writer = None
    try:
        with _storage_faults(cache_dir):
            writer = CacheWriter(directory, vocab_size)
        yield writer
        assert (directory / MANIFEST).is_file(), "an entry must be finished before the block ends"
        with _storage_faults(cache_dir):
            _put_in_place(directory, cache_dir / key)
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):  # data that a full disk rejected
                writer.close()
        unfinished.close()


def _put_in_place(directory: Path, target: Path) -> None:
    """Rename a complete entry to its final name, replacing a damaged one."""
    release(directory)
    follow_umask(directory)
    if target.exists():
        try:
            TokenizedDataset(target)
        except CacheFault:
            damaged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.tmp-"))
            target.rename(damaged / "damaged")
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            return  # another process was faster
    directory.rename(target)
    sync(target.parent)


def _verified_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        is_current = manifest["format_version"] == FORMAT_VERSION
        files = manifest["files"]
        sizes = {n: int(files[n]["count"]) * np.dtype(files[n]["dtype"]).itemsize for n in TYPES}
        is_known = all(files[name]["dtype"] in types for name, types in TYPES.items())
        is_described = isinstance(manifest["report"], dict)
        hashes = {name: str(files[name]["sha256"]) for name in TYPES}
        actual = {name: (directory / f"{name}.bin").stat().st_size for name in TYPES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheFault(f"its manifest cannot be read ({type(error).__name__})") from error
    if not (is_current and is_known and is_described):
        raise CacheFault("it is from another version")
    if sizes != actual:
        raise CacheFault("a file has another size than its manifest says")
    if sum(sizes.values()) <= VERIFIED_BYTES:
        for name, expected in hashes.items():
            with (directory / f"{name}.bin").open("rb") as stream:
                if _sha256(stream) != expected:
                    raise CacheFault(f"{name}.bin has changed since it was written")
    return manifest


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _mapped(directory: Path, name: str, manifest: Mapping[str, Any]) -> NDArray[Any]:
    described = manifest["files"][name]
    if described["count"] == 0:
        return np.zeros(0, dtype=described["dtype"])
    return np.memmap(directory / f"{name}.bin", dtype=described["dtype"], mode="r")


def _verify_shapes(arrays: Mapping[str, NDArray[Any]]) -> None:
    offsets = arrays["offsets"]
    rows, tokens = len(offsets) - 1, len(arrays["ids"])
    has_shapes = len(arrays["trained"]) == tokens and all(
        len(arrays[name]) == rows for name in ("trained_counts", "row_hashes", "sources")
    )
    if rows < 0 or not has_shapes or offsets[0] != 0 or offsets[-1] != tokens:
        raise CacheFault("its files are inconsistent")
    if np.any(np.diff(offsets) < 0):
        raise CacheFault("its rows overlap")


@contextmanager
def _storage_faults(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except TrainerError:
        raise
    except PermissionError as error:
        raise AccessError.of(
            "no permission to write to the cache of tokenized data",
            where=str(cache_dir),
            remedy="make it writable for this user, or set dataset_cache_dir to another folder",
        ) from error
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError.of(
            "the disk is full" if is_full else "writing to the cache of tokenized data failed",
            where=str(cache_dir),
            why=error.strerror or "",
            remedy="free disk space (df -h), or set dataset_cache_dir to a folder on a larger disk",
        ) from error
