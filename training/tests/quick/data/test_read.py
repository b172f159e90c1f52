"""Reading rows: every file kind, every way a file or a row can be broken, bounded memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_trainer.data.bad_rows import MAX_DEPTH, BadRow, BadRowLog, Row, fault_in
from lora_trainer.data.read import iter_rows
from lora_trainer.data.resolve import KINDS, SourceSpec, locate
from lora_trainer.errors import AccessError, DataError, StorageError, TrainerError, UnavailableError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\nd", "completion": "é"}]
SECRET = "the moon is a secret"


def read(path: Path | str, **options) -> list[Row | BadRow]:
    return list(iter_rows(SourceSpec(str(path), **options)))


def values(path: Path | str, **options) -> list:
    return [row.value if isinstance(row, Row) else row.reason for row in read(path, **options)]


def write_as(kind: str, path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    lines = [json.dumps(row) for row in ROWS]
    if kind == "jsonl":
        path.write_text("\n".join(lines))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "csv":
        path.write_text('prompt,completion\na,b\n"c\nd",é\n')
    elif kind == "tsv":
        path.write_text('prompt\tcompletion\na\tb\n"c\nd"\té\n')
    elif kind == "parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("is_gzip", [False, True])
def test_every_file_kind_gives_the_same_rows(tmp_path, kind, is_gzip):
    path = write_as(kind, tmp_path / f"data.{kind}")
    if is_gzip:
        packed = tmp_path / f"data.{kind}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert values(path) == ROWS


def test_a_text_file_gives_its_lines_without_the_blank_ones(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\r\n\n  \ntwo")
    assert [(row.value, row.where) for row in read(path)] == [
        ("one", f"{path}:1"),
        ("two", f"{path}:4"),
    ]


def test_an_arrow_stream_as_datasets_saves_it_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == ROWS


def test_fields_that_other_rows_structs_have_are_not_filled_in(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "tool", "name": "f"}]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert values(tmp_path / "data.parquet") == rows


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"data": [{"text": "a"}], "version": 1}', [{"text": "a"}]),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', [{"text": "a"}]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('{\n"text": "a"\n}\n', [{"text": "a"}]),
    ],
)
def test_a_json_file_may_hold_rows_in_several_ways(tmp_path, content, expected):
    (tmp_path / "d.json").write_text(content)
    assert values(tmp_path / "d.json") == expected


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbftext,x\na,b\n")
    assert values(tmp_path / "d.jsonl") == [{"text": "a"}]
    assert values(tmp_path / "d.csv") == [{"text": "a", "x": "b"}]


def test_a_spreadsheets_semicolons_delimit(tmp_path):
    (tmp_path / "d.csv").write_text("prompt;completion\na;b, c\n")
    assert values(tmp_path / "d.csv") == [{"prompt": "a", "completion": "b, c"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "' + SECRET.encode() + b'"', "invalid JSON at column"),
        (b'{"text": "' + SECRET.encode() + b'\xff"}', "not valid UTF-8, at byte"),
        (b'{"messages"', "invalid JSON at column 12"),
        (b"[1, 2]", "is a JSON list, expected an object"),
        (b"null", "is a JSON NoneType"),
        (b'{"text": "a\0b"}', "a NUL character"),
        (b'{"text": "' + SECRET.encode() + b'\\u0000"}', "field 'text' contains a NUL"),
        (b'{"text": "' + SECRET.encode() + b'\\ud800"}', "field 'text' is not valid UTF-8"),
        (b'{"text": "' + b"x" * 1_000_000 + b'"}', "1,000,000 bytes or larger"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep nesting"),
        (b'{"text": ' + b"[" * 90 + b"]" * 90 + b"}", f"more than {MAX_DEPTH} levels"),
        (b'{"text": ' + b"9" * 5000 + b"}", "too long a number"),
        (b'{"text": "a", "text": "' + SECRET.encode() + b'"}', "the key 'text' twice"),
        (b'{"x": [{"weight": 0, "weight": 1}], "text": "a"}', "the key 'weight' twice"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line_and_never_quoted(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good too"}\n')
    good, bad, next_good = read(path)
    assert isinstance(good, Row)
    assert bad.where == f"{path}:2"
    assert reason in bad.reason
    assert SECRET not in bad.reason
    assert next_good.value == {"text": "good too"}


@pytest.mark.parametrize(
    ("lines", "where", "reason"),
    [
        (b"a,b\n1,2,3\n", 2, "has 3 fields, the header has 2"),
        (b"a,b\n1,\xff\n", 2, "field 'b' is not valid UTF-8"),
        (b"a,b\n" + b"x" * 1_000_001 + b",2\n", 2, "1,000,000 bytes or larger"),
        (b'a,b\n"1\n1",2\n3\n', 4, "has 1 fields"),
    ],
)
def test_a_bad_csv_row_is_named_by_the_line_it_begins_on(tmp_path, lines, where, reason):
    path = tmp_path / "d.csv"
    path.write_bytes(lines)
    bad = read(path)[-1]
    assert (bad.where, reason in bad.reason) == (f"{path}:{where}", True)


def test_a_csv_field_beyond_the_modules_own_limit_is_read(tmp_path):
    (tmp_path / "d.csv").write_text(f"text,n\n{'x' * 500_000},1\n")
    assert len(values(tmp_path / "d.csv")[0]["text"]) == 500_000


def test_bad_utf8_in_one_parquet_row_leaves_the_others(tmp_path):
    buffers = pa.array([b"ok", b"\xff\xfe", b"fine"], pa.binary()).buffers()
    text = pa.Array.from_buffers(pa.string(), 3, buffers)
    parquet.write_table(pa.table({"text": text}), tmp_path / "d.parquet")
    good, bad, fine = read(tmp_path / "d.parquet")
    assert (good.value, fine.value) == ({"text": "ok"}, {"text": "fine"})
    assert bad.where.endswith("row 2")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("d.jsonl", b"", DataError),
        ("d.jsonl", b"\n \n", DataError),
        ("d.json", b"[]", DataError),
        ("d.json", b"[1,", DataError),
        ("d.json", b'[{"text": "a"},\n{"text": "a", "text": "b"}]', DataError),
        ("d.json", b'["\xff"]', DataError),
        ("d.csv", b"a,b\n", DataError),
        ("d.csv", b"a,a\n1,2\n", DataError),
        ("d.parquet", b"PAR1 and no more", DataError),
        ("d.arrow", b"nothing of the kind", DataError),
        ("d.jsonl.gz", b"not gzip", DataError),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], DataError),
        ("d.jsonl", '{"text": "a"}'.encode("utf-16"), DataError),
        ("d.docx", b"x", DataError),
    ],
)
def test_an_unreadable_file_is_an_error_that_names_it(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in caught.value.block()


@pytest.mark.parametrize(
    ("fault", "error"),
    [(PermissionError(13, "no"), AccessError), (OSError(5, "I/O"), StorageError)],
)
def test_faults_of_the_file_system_keep_their_exit_codes(tmp_path, monkeypatch, fault, error):
    path = tmp_path / "d.jsonl"
    path.write_text("{}")

    def refuse(*_args, **_options):
        raise fault

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(error):
        read(path)


def test_a_missing_local_path_suggests_a_near_one(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "trian.jsonl")
    assert f"did you mean {tmp_path / 'train.jsonl'} ?" in caught.value.block()


def test_a_relative_path_is_looked_for_in_the_datasets_folder_too(tmp_path):
    (tmp_path / "mine").mkdir()
    write_as("jsonl", tmp_path / "mine" / "d.jsonl")
    assert values("mine/d.jsonl", datasets_dir=str(tmp_path)) == ROWS


def test_a_folder_gives_the_asked_split_only(tmp_path):
    write_as("jsonl", tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text('{"text": "held out"}')
    (tmp_path / "README.txt").write_text("about")
    assert values(tmp_path) == ROWS
    assert values(tmp_path, split="test") == [{"text": "held out"}]
    with pytest.raises(DataError, match="no split 'validation'"):
        read(tmp_path, split="validation")


def test_a_folder_without_splits_gives_all_of_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert values(tmp_path) == [{"text": name} for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["owner/name", "squad", "hf://owner/name"])
def test_names_that_are_no_local_path_are_hub_ids(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert locate(SourceSpec(name)) is None


@pytest.mark.parametrize("name", ["./squad", "data/train.jsonl", "a/b/c", "/no/where", "owner\0x"])
def test_names_that_can_only_be_paths_are_never_sent_to_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        locate(SourceSpec(name))


def test_a_hub_dataset_is_read_row_by_row(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = {}

    def load(path, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("owner/name", split="train[:2]", revision="v1")
    assert [row.value for row in rows] == ROWS
    assert rows[1].where == "owner/name: row 2"
    assert asked == {"path": "owner/name", "name": None, "split": "train[:2]", "revision": "v1"}


class GatedRepoError(Exception):
    pass


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), UnavailableError, "no such dataset"),
        (ConnectionError("x"), UnavailableError, "cannot be reached"),
        (GatedRepoError("x"), AccessError, "HF_TOKEN"),
        (OSError(28, "full"), StorageError, "disk is full"),
        (ValueError(SECRET), DataError, "no such split"),
        (datasets.exceptions.DatasetGenerationError(SECRET), DataError, "cannot be loaded"),
    ],
)
def test_faults_of_the_hub_are_explained(monkeypatch, tmp_path, fault, error, words):
    monkeypatch.chdir(tmp_path)
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)

    def load(*_args, **_options):
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(error) as caught:
        read("owner/name")
    assert words in caught.value.block()
    assert SECRET not in caught.value.block()


def test_offline_says_so_and_suggests_a_near_local_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squadd").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def load(*_args, **_options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UnavailableError) as caught:
        read("squad")
    assert "HF_HUB_OFFLINE" in caught.value.block()
    assert "did you mean the local path squadd ?" in caught.value.block()


def test_error_policy_lists_the_first_twenty_and_counts_all():
    log = BadRowLog("error")
    log.rows_read = 100
    for line in range(30):
        log.add(BadRow(f"f:{line}", f"has {line} fields"))
    with pytest.raises(DataError) as caught:
        log.check()
    block = caught.value.block()
    assert "30 of 100 rows cannot be used" in block
    assert "f:19" in block
    assert "f:20" not in block
    assert "and 10 more" in block
    assert log.reasons == {"has N fields": 30}


def test_skip_policy_refuses_a_larger_share_than_allowed():
    log = BadRowLog("skip", max_fraction=0.1)
    log.rows_read = 10
    log.add(BadRow("f:1", "bad"))
    log.check()
    log.add(BadRow("f:2", "bad"))
    with pytest.raises(DataError, match="max_bad_rows_share"):
        log.check()


@pytest.mark.parametrize(("bad", "offers_skip"), [(1, True), (2, False)])
def test_skip_is_offered_only_where_it_would_be_enough(bad, offers_skip):
    log = BadRowLog("error", max_fraction=0.1)
    log.rows_read = 10
    for line in range(bad):
        log.add(BadRow(f"f:{line}", "bad"))
    remedy = log.problems()[0].remedy
    assert ("set on_bad_rows: skip" in remedy) == offers_skip
    assert ("20.0% are too many to skip (max_bad_rows_share is 10.0%)" in remedy) != offers_skip


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_reading_a_large_file_takes_little_memory(tmp_path, kind):
    path = tmp_path / f"big.{kind}"
    line = {"jsonl": '{"text": "%s"}', "csv": "%s,1", "txt": "%s"}[kind] % ("word " * 100)
    path.write_text("text,n\n" * (kind == "csv") + f"{line}\n" * 20_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in iter_rows(SourceSpec(str(path))))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 2_000_000 < path.stat().st_size


def test_one_endless_line_takes_little_memory(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"x" * 30_000_000)
    tracemalloc.start()
    try:
        (bad,) = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(bad, BadRow)
    assert peak < 6_000_000


@pytest.mark.parametrize("suffix", [*KINDS, ".jsonl.gz"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=400))
@example(content=b"\x1c")  # white space to Unicode, not to bytes
def test_no_bytes_in_a_file_raise_anything_but_our_own_errors(tmp_path, suffix, content):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    try:
        rows = read(path)
    except TrainerError:
        return
    assert rows
    assert all(isinstance(row, BadRow) or fault_in(row.value) is None for row in rows)
