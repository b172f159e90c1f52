"""The cache of tokenized data: what is written is what is read, or it is made again."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from lora_trainer.data import cache, fingerprint
from lora_trainer.data.cache import CacheFault, TokenizedDataset, cache_key, new_entry, open_entry
from lora_trainer.data.fingerprint import MEMORY_NAME, FileHashes
from lora_trainer.errors import AccessError, StorageError

KEY = cache_key({"test": 1})


def make(directory, vocab_size=100, top_id=99):
    with new_entry(directory, KEY, vocab_size) as writer:
        writer.append(
            np.array([1, 2, 3, 4, top_id]),
            np.array([0, 1, 1, 0, 1]),
            np.array([3, 2]),
            np.array([2**64 - 1, 7], dtype=np.uint64),
            source=0,
        )
        writer.append(np.array([5]), np.array([1]), np.array([1]), np.array([8]), source=1)
        writer.finish(KEY, {"rows_read": 3})
    return open_entry(directory, KEY)


def test_rows_come_back_as_they_were_written(tmp_path):
    dataset = make(tmp_path)
    ids, trained = dataset[1]
    assert (ids.tolist(), trained.tolist()) == ([4, 99], [False, True])
    assert dataset[-1][0].tolist() == [5]
    assert len(dataset) == 3
    assert dataset.lengths.tolist() == [3, 2, 1]
    assert dataset.supervised_counts.tolist() == [2, 1, 1]
    assert dataset.row_hashes.tolist() == [2**64 - 1, 7, 8]
    assert dataset.sources.tolist() == [0, 0, 1]
    assert dataset.report == {"rows_read": 3}


def test_a_row_out_of_range_is_an_index_error(tmp_path):
    with pytest.raises(IndexError):
        make(tmp_path)[3]


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, bytes_each):
    dataset = make(tmp_path, vocab_size, vocab_size - 1)
    assert (dataset.directory / "ids.bin").stat().st_size == 6 * bytes_each
    assert dataset[1][0].tolist() == [4, vocab_size - 1]


def test_an_entry_that_is_not_there_is_none(tmp_path):
    assert open_entry(tmp_path, KEY) is None


def test_a_fault_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), new_entry(tmp_path, KEY, 9):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ids", "trained", "offsets", "row_hashes"])
def test_a_flipped_bit_is_found(tmp_path, name):
    path = make(tmp_path).directory / f"{name}.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheFault, match="changed"):
        open_entry(tmp_path, KEY)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "ids.bin").write_bytes(b"12"),
        lambda entry: (entry / "ids.bin").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("{"),
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "manifest.json").write_text('{"format_version": 1, "files": 3}'),
        lambda entry: (entry / "manifest.json").write_bytes(b"\xff"),
    ],
)
def test_a_damaged_entry_is_found(tmp_path, damage):
    damage(make(tmp_path).directory)
    with pytest.raises(CacheFault):
        open_entry(tmp_path, KEY)


def test_an_entry_of_another_version_is_found(tmp_path):
    manifest = make(tmp_path).directory / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 0}))
    with pytest.raises(CacheFault, match="version"):
        open_entry(tmp_path, KEY)


def test_a_damaged_entry_is_replaced(tmp_path):
    (make(tmp_path).directory / "ids.bin").unlink()
    assert len(make(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def test_an_entry_that_another_process_made_meanwhile_is_taken(tmp_path):
    with new_entry(tmp_path, KEY, 9) as slower:
        slower.append(np.array([1]), np.array([1]), np.array([1]), np.array([1]), source=0)
        slower.finish(KEY, {})
        faster = make(tmp_path)
    assert len(open_entry(tmp_path, KEY)) == len(faster) == 3


def test_what_a_killed_run_left_without_a_lock_is_removed_an_hour_later(tmp_path):
    old, new = tmp_path / f"{KEY}.tmp-old", tmp_path / f"{KEY}.tmp-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    make(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (OSError(28, "No space left on device"), StorageError, "the disk is full"),
        (PermissionError(13, "denied"), AccessError, "dataset_cache_dir"),
    ],
)
def test_faults_of_the_disk_are_explained(tmp_path, monkeypatch, fault, error, words):
    def refuse(_handle):
        raise fault

    monkeypatch.setattr(cache.os, "fsync", refuse)
    with pytest.raises(error) as caught:
        make(tmp_path)
    assert words in caught.value.block()
    assert list(tmp_path.iterdir()) == []


def test_the_key_changes_with_every_part():
    keys = {cache_key({"a": 1, "b": 2}), cache_key({"a": 1, "b": 3}), cache_key({"a": 1})}
    assert len(keys) == 3
    assert cache_key({"b": 2, "a": 1}) in keys


def test_large_entries_are_opened_without_hashing_them(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(cache, "VERIFIED_BYTES", 10)
    monkeypatch.setattr(cache, "_sha256", lambda _stream: pytest.fail("hashed"))
    assert TokenizedDataset(tmp_path / KEY).token_count == 6


@pytest.fixture
def settled(monkeypatch):
    """Take every file for one that was written long ago."""
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -60)


def test_a_settled_file_is_hashed_once_and_again_when_it_changes(tmp_path, settled):
    path = tmp_path / "d.jsonl"
    path.write_text("one")
    hashes = FileHashes(tmp_path)
    first = hashes.sha256(path)
    hashes.save()
    remembered = json.loads((tmp_path / MEMORY_NAME).read_text())
    assert remembered[str(path)][-1] == first
    assert FileHashes(tmp_path).sha256(path) == first
    path.write_text("two!")
    assert FileHashes(tmp_path).sha256(path) != first


def test_an_edit_in_place_that_restores_the_time_stamp_is_noticed(tmp_path, settled):
    path = tmp_path / "d.jsonl"
    path.write_text("one")
    before = path.stat()
    first = FileHashes(tmp_path).sha256(path)
    hashes = FileHashes(tmp_path)
    hashes.sha256(path)
    time.sleep(0.05)  # longer than a tick of the file system's clock
    with path.open("r+") as stream:
        stream.write("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_size", "st_mtime_ns", "st_ino")
    assert all(getattr(before, name) == getattr(after, name) for name in same)
    assert hashes.sha256(path) != first


def test_a_remembered_file_is_not_read_again(tmp_path, settled, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text("one")
    hashes = FileHashes(tmp_path)
    first = hashes.sha256(path)
    monkeypatch.setattr(fingerprint.hashlib, "sha256", lambda: pytest.fail("read again"))
    assert hashes.sha256(path) == first


def test_a_file_written_just_now_is_not_remembered(tmp_path):
    (tmp_path / "d.jsonl").write_text("one")
    hashes = FileHashes(tmp_path)
    hashes.sha256(tmp_path / "d.jsonl")
    hashes.save()
    assert not (tmp_path / MEMORY_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"x": 1}'])
def test_a_damaged_memory_of_hashes_is_ignored(tmp_path, content):
    (tmp_path / MEMORY_NAME).write_bytes(content)
    (tmp_path / "d.jsonl").write_text("one")
    assert len(FileHashes(tmp_path).sha256(tmp_path / "d.jsonl")) == 64
