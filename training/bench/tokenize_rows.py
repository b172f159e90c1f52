"""Tokenize many synthetic chat rows: seconds and peak memory, first and second time.

Run it with `training/.venv/bin/python training/bench/tokenize_rows.py --rows 1000000`.
Measured on two cores that other work shared (load 5 to 7), with a million rows of 59 tokens:
1,198 s and 292 MB, the second time 1.0 s.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lora_trainer.config.schema import ModelSection
from lora_trainer.data.encoder import TokenizerFactory
from lora_trainer.data.prepare import PrepareSettings, prepare
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.model.load import locate

WORDS = ["lamp", "room", "green", "seven", "open", "river", "paper", "listen", "cold", "window"]


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(1)
    with path.open("w") as file:
        for number in range(rows):
            question = " ".join(draw.choices(WORDS, k=18))
            answer = " ".join(draw.choices(WORDS, k=12))
            messages = [
                {"role": "system", "content": f"Row {number}."},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


class PeakMemory:
    """The largest summed resident size of this process and its children, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._is_over.wait(0.2):
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    factory = TokenizerFactory(Path(locate(ModelSection()).path))
    settings = PrepareSettings(2048, "truncate", "error", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        for turn in ("first", "second"):
            start = time.monotonic()
            with PeakMemory() as peak:
                dataset, report = prepare(
                    [SourceSpec(str(path))],
                    encoder=factory,
                    settings=settings,
                    vocab_size=49_152,
                    cache_dir=Path(folder) / "cache",
                )
            seconds = time.monotonic() - start
            print(
                f"{turn}: {len(dataset):,} rows, {report.tokens:,} tokens, {report.cache}, "
                f"{seconds:.1f} s, peak {peak.bytes / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
