"""The rows of a job: the Jargon File from Debian's package, or the demo set.

Nothing of the package is kept in the project: it is downloaded into the cache folder.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from pathlib import Path
from typing import Any

PACKAGE = "dict-jargon"
DIGITS = {
    character: value
    for value, character in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    )
}
DEMO = Path(__file__).resolve().parents[3] / "public/datasets/demo/train.jsonl"
SEED = 13


def jargon_rows(cache: Path) -> list[dict[str, Any]]:
    """Return a chat row for each entry of the Jargon File, in a random order."""
    folder = _unpacked(cache / "jargon")
    text = gzip.decompress((folder / "jargon.dict.dz").read_bytes())
    rows = []
    for line in (folder / "jargon.index").read_text(encoding="utf-8").splitlines():
        headword, start, length = line.split("\t")
        if headword.startswith("00-database"):
            continue
        begin = _number(start)
        entry = text[begin : begin + _number(length)].decode("utf-8").strip()
        name, _, body = entry.partition("\n")
        rows.append(_chat(f"What does {name.strip()!r} mean?", " ".join(body.split())))
    random.Random(SEED).shuffle(rows)
    return rows


def demo_rows() -> list[dict[str, Any]]:
    """Return the rows of the demo set."""
    return [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]


def _chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _number(digits: str) -> int:
    """Return a number of a dictd index. Source: dictd(8), base 64, the highest digit first."""
    value = 0
    for character in digits:
        value = value * 64 + DIGITS[character]
    return value


def _unpacked(folder: Path) -> Path:
    """Return the folder of the package's two files; download and unpack it once."""
    tree = folder / "usr/share/dictd"
    if not (tree / "jargon.index").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "-q", "download", PACKAGE], cwd=folder, check=True)
        [archive] = folder.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
    return tree
