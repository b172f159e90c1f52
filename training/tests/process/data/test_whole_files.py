"""Files that are not what their name says: read as what they are, or one error with its cause."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lora_trainer.data.bad_rows import BadRow, Row
from lora_trainer.data.encodings import guess_encoding
from lora_trainer.data.read import iter_rows
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.errors import DataError, Problem

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FRENCH = (
    "instruction,output\nSay it\u2019s cold,Il fait froid à Montréal\nAnd warm?,Là il fait chaud\n"
)


def read(path: Path) -> list[Row | BadRow]:
    return list(iter_rows(SourceSpec(str(path))))


def values(path: Path) -> list:
    return [row.value if isinstance(row, Row) else row.reason for row in read(path)]


def problem_of(path: Path) -> Problem:
    with pytest.raises(DataError) as caught:
        read(path)
    (problem,) = caught.value.problems
    return problem


def columnar(kind: str) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def zipped(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, LINES)
    return sink.getvalue()


READABLE = {
    "an array on one line": json.dumps(ROWS).encode(),
    "a pretty-printed array": json.dumps(ROWS, indent=1).encode(),
    "an array behind a byte order mark": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "an array longer than a row may be": json.dumps(
        [*ROWS, {"prompt": "x" * 600_000, "completion": "y" * 600_000}][:5]
    ).encode(),
    "pretty-printed objects": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "an object that holds the rows": json.dumps({"data": ROWS}, indent=2).encode(),
    "gzip under a plain name": gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("content", READABLE)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_json_of_another_shape_is_read_as_what_it_is(tmp_path, content, name):
    (tmp_path / name).write_bytes(READABLE[content])
    assert values(tmp_path / name)[:4] == ROWS


def test_a_csv_file_with_tabs_is_read(tmp_path):
    (tmp_path / "d.csv").write_text("prompt\tcompletion\na\tb, c\n")
    assert values(tmp_path / "d.csv") == [{"prompt": "a", "completion": "b, c"}]


OTHER = {
    "parquet": ("d.jsonl", columnar("parquet"), "a Parquet file"),
    "arrow": ("d.json", columnar("arrow"), "an Arrow file"),
    "json as parquet": ("d.parquet", LINES.encode(), "JSON lines, not Parquet"),
    "array as arrow": ("d.arrow", json.dumps(ROWS).encode(), "JSON, not Arrow"),
    "csv as parquet": ("d.parquet", b"a,b\n1,2\n", "CSV, not Parquet"),
    "json as csv": ("d.csv", LINES.encode(), "JSON lines, not CSV"),
    "csv as jsonl": ("d.jsonl", b"prompt,completion\na,b\nc,d\n", "is not JSON lines"),
    "plain as gzip": ("d.jsonl.gz", LINES.encode(), "not gzipped"),
    "utf-16": ("d.jsonl", LINES.encode("utf-16"), "UTF-16 text"),
    "utf-16 without a mark": ("d.jsonl", LINES.encode("utf-16-le"), "UTF-16LE text"),
    "utf-32": ("d.csv", FRENCH.encode("utf-32"), "UTF-32 text"),
    "packed utf-16": ("d.csv.gz", gzip.compress(FRENCH.encode("utf-16")), "UTF-16 text"),
    "bzip2": ("d.jsonl", bz2.compress(LINES.encode()), "compressed with bzip2"),
    "xz": ("d.jsonl", lzma.compress(LINES.encode()), "compressed with xz"),
    "dictionaries": ("d.jsonl", "".join(f"{row}\n" for row in ROWS).encode(), "is not JSON lines"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_file_of_another_kind_is_one_error_whose_remedy_makes_it_readable(tmp_path, case):
    name, content, what = OTHER[case]
    path = tmp_path / name
    path.write_bytes(content)
    problem = problem_of(path)
    assert what in problem.what
    assert str(path) in problem.where
    if shutil.which(problem.remedy.split()[0]):
        subprocess.run(["bash", "-c", problem.remedy], check=True)
        (converted,) = [p for p in tmp_path.iterdir() if p != path]
        assert all(isinstance(row, Row) for row in read(converted))


HOPELESS = {
    "a web page": b"<!DOCTYPE html>\n<html>\n<body>" + b"<p>\n" * 50,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a server's error": b"Entry not found",
    "a zip archive": zipped("data.jsonl"),
    "an Excel workbook": zipped("[Content_Types].xml"),
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\n" + b"obj\n" * 50,
    "none of the first 20 lines": b"instruction: x\noutput: y\n" * 30,
    "every line is a JSON array": b'[{"role": "user", "content": "q"}]\n' * 30,
}


@pytest.mark.parametrize("what", HOPELESS)
def test_a_file_of_no_rows_is_one_error_that_names_the_cause(tmp_path, what):
    (tmp_path / "d.jsonl").write_bytes(HOPELESS[what])
    problem = problem_of(tmp_path / "d.jsonl")
    assert what.split("'")[0] in f"{problem.what} {problem.why}"
    assert problem.remedy


def test_broken_lines_before_a_good_one_are_named_each(tmp_path):
    (tmp_path / "d.jsonl").write_text("{\n{'a': 1}\n" + LINES)
    (tmp_path / "e.jsonl").write_text("{'a': 1}\n[]\n" + LINES)
    assert values(tmp_path / "e.jsonl")[2:] == ROWS
    assert [row.where[-2:] for row in read(tmp_path / "e.jsonl")[:2]] == [":1", ":2"]


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.json", "d.txt", "d.csv.gz"])
def test_text_in_another_encoding_is_one_error_with_the_command_that_converts_it(tmp_path, name):
    text = FRENCH
    if "json" in name:
        text = "".join(
            json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in FRENCH.split("\n")
        )
    content = text.encode("cp1252")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    problem = problem_of(path)
    assert problem.what == "the file is not UTF-8 text"
    assert "CP1252 (Windows, Western European)" in problem.why
    assert "iconv -f CP1252 -t UTF-8" in problem.remedy
    subprocess.run(["bash", "-c", problem.remedy], check=True)
    (converted,) = [p for p in tmp_path.iterdir() if p != path]
    assert converted.read_text() == text
    assert all(isinstance(row, Row) for row in read(converted))


def test_one_row_of_bad_bytes_in_a_utf8_file_stays_a_bad_row(tmp_path):
    (tmp_path / "d.csv").write_bytes("prompt,completion\nq,é\nq,".encode() + b"\xe9\n")
    good, bad = read(tmp_path / "d.csv")
    assert isinstance(good, Row)
    assert isinstance(bad, BadRow)


SENTENCES = {
    "CP1252": ("cp1252", "\u201cnaïve\u201d façade \u2013 déjà vu, señor, Größe, ça va où?"),
    "CP1250": ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy, a zażółcone łąki są tu"),
    "MACINTOSH": (
        "mac_roman",
        "Le café est fermé, où êtes-vous allé cet été, mon chéri? Ça va très bien",
    ),
    "CP1251": ("cp1251", "Привет, как дела? Сегодня хорошая погода, и мы пойдём гулять."),
    "KOI8-R": ("koi8_r", "Привет, как дела? Сегодня хорошая погода, и мы пойдём гулять."),
    "CP932": ("cp932", "これは日本語の文章です。カタカナとひらがなと漢字があります。"),
    "EUC-JP": ("euc_jp", "これは日本語の文章です。カタカナとひらがなと漢字があります。"),
    "GB18030": ("gb18030", "这是一个中文句子。我们用它来测试编码的识别。今天天气很好。"),
    "CP949": ("cp949", "이것은 한국어 문장입니다. 오늘 날씨가 아주 좋습니다."),
    "BIG5": ("big5", "這是一個中文句子。我們用它來測試編碼的識別。今天天氣很好。"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_running_text_is_recognised_in_its_encoding(name):
    codec, text = SENTENCES[name]
    assert guess_encoding(text.encode(codec)) == name


@pytest.mark.parametrize("sample", [b"", b"plain", b"a \xff b", b"\xc3", bytes(range(128, 256))])
def test_bytes_that_are_no_text_are_not_given_an_encoding(sample):
    assert guess_encoding(sample) is None
