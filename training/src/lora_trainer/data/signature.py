"""Detect a file's type from its first bytes when its name says something else.

A wrong file is one error that names the cause, not one error per line.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DataError
from ..host.quoting import shell_word
from .lines import BYTE_ORDER_MARK, conversion
from .resolve import DataFile

HEAD_BYTES = 4096
GZIP = b"\x1f\x8b"
_BINARY: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", "mv {file} {base}.parquet"),
    (b"ARROW1", "an Arrow file", "mv {file} {base}.arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "mv {file} {base}.arrow"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "zstd -d {file} -o {base}.unpacked.{kind}"),
    (b"\xfd7zXZ\0", "compressed with xz", "xz -dc {file} > {base}.unpacked.{kind}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x {file}"),
    (b"%PDF", "a PDF document", "export its text as JSON lines, one object per row"),
    (b"SQLite format 3\0", "an SQLite database", "export a table as CSV: sqlite3 -csv -header"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "save it as CSV UTF-8 from the spreadsheet"),
    (b"\x89HDF", "an HDF5 file", "export its rows as JSON lines"),
    (b"\x80\x04\x95", "a Python pickle", "write it as JSON lines: a pickle can run any code"),
    (b"\x80\x05\x95", "a Python pickle", "write it as JSON lines: a pickle can run any code"),
)
_COLUMNAR: dict[str, tuple[bytes, ...]] = {
    "parquet": (b"PAR1",),
    "arrow": (b"ARROW1", b"\xff\xff\xff\xff"),
}
_NAMES = {
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "tab-separated text",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "txt": "plain text",
}
_HTML = re.compile(rb"<(!doctype\s+html|html|head|\?xml|!--)", re.IGNORECASE)
_LFS = b"version https://git-lfs.github.com/spec/"
_HUB_ANSWERS = (
    b"Entry not found",
    b"Invalid username or password",
    b"Repository not found",
    b"Access to ",
    b"404: Not Found",
    b"Not Found",
)


def refuse_other_content(head: bytes, file: DataFile) -> None:
    """Reject a file whose first `HEAD_BYTES` do not match its name.

    Raises:
        DataError: with the actual file type, and the command that converts it.
    """
    if not head or head.startswith(_COLUMNAR.get(file.kind, ())):
        return
    content = _binary(head, file) or _text(head, file) or _other_kind(head, file)
    if content:
        raise DataError.of(
            f"the file is {content[0]}, not {_NAMES[file.kind]}",
            where=file.shown,
            remedy=content[1],
        )


def _binary(head: bytes, file: DataFile) -> tuple[str, str] | None:
    for magic, what, remedy in _BINARY:
        if head.startswith(magic):
            return what, _filled(remedy, file)
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "compressed with bzip2", _filled("bzip2 -dc {file} > {base}.unpacked.{kind}", file)
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            return "an Excel workbook", "save it as CSV UTF-8 from the spreadsheet"
        return "a zip archive", _filled("unzip {file}", file)
    if head[257:262] == b"ustar":
        return "a tar archive", _filled("tar -xf {file}", file)
    if file.kind not in _COLUMNAR and (encoding := _wide_encoding(head)):
        return f"{encoding} text, which is not UTF-8", conversion(file, encoding)
    return None


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32, with or without a byte order mark."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    pairs = len(head) // 2
    if pairs >= 4:
        # A file of ASCII text: every second byte is null.
        if head[1 : 2 * pairs : 2].count(0) > 0.7 * pairs and head[0] != 0:
            return "UTF-16LE"
        if head[0 : 2 * pairs : 2].count(0) > 0.7 * pairs and head[1] != 0:
            return "UTF-16BE"
    return None


def _text(head: bytes, file: DataFile) -> tuple[str, str] | None:
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(_LFS):
        folder, name = shell_word(file.path.parent), shell_word(file.path.name)
        pull = f"git -C {folder} lfs pull --include {name}"
        return "a Git LFS pointer: its content was not downloaded", pull
    if file.kind == "txt":
        return None
    if _HTML.match(text):
        remedy = "download the file itself: use /resolve/ in the URL on the hub, /raw/ on GitHub"
        return "a web page", remedy
    if len(head) < 400 and text.startswith(_HUB_ANSWERS):
        return "a server's error message", "download it again, with the required access"
    return None


def _other_kind(head: bytes, file: DataFile) -> tuple[str, str] | None:
    kind = _kind_of_text(head)
    is_json = kind in ("json", "jsonl")
    if kind and (file.kind in _COLUMNAR or (is_json and file.kind in ("csv", "tsv"))):
        return _renamed(file, kind)
    return None


def _kind_of_text(head: bytes) -> str | None:
    """Return the kind of data file that a text looks like."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if b"\0" in text:
        return None
    if re.match(rb'\[\s*[{\["]', text):
        return "json"
    if re.match(rb'\{\s*"', text):
        return "jsonl" if text.startswith(b'{"') else "json"
    try:
        text[:-3].decode()
    except UnicodeDecodeError:
        return None
    return "csv" if b"," in text.partition(b"\n")[0] else "txt"


def _renamed(file: DataFile, kind: str) -> tuple[str, str]:
    what = _NAMES[kind]
    packed = ".gz" if file.path.name.lower().endswith(".gz") else ""
    return what, _filled(f"mv {{file}} {{base}}.{kind}{packed}", file)


def _filled(remedy: str, file: DataFile) -> str:
    name = file.path.name
    if name.lower().endswith(".gz"):
        name = name[:-3]
    base = file.path.with_name(Path(name).stem)
    return remedy.format(file=shell_word(file.path), base=shell_word(base), kind=file.kind)
