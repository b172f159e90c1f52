"""How fast rows become tokens and labels: this project and TRL, each in a fresh process.

    python -m comparison.tokenizing lora-trainer|trl MODEL ROWS.jsonl OUT.json

Timed is everything from the file to token ids and labels on disk, with a process for every core and
no cache to start from; importing and loading the tokenizer are not. Both must find the same tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .job import IGNORED

COPIES = 4  # of each entry of the Jargon File, every one with a number of its own


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write the rows several times, so that no two are the same."""
    with path.open("w", encoding="utf-8") as file:
        for copy in range(COPIES):
            for row in rows:
                asked, answered = row["messages"]
                asked = asked | {"content": f"{copy}: {asked['content']}"}
                file.write(json.dumps({"messages": [asked, answered]}) + "\n")
    return path


def ours(model: str, rows: Path, folder: Path) -> dict[str, float]:
    """Tokenize as a run does."""
    from lora_trainer.config.settings import resolve
    from lora_trainer.model import load
    from lora_trainer.train.datasets import open_data

    values = {"model_name_or_path": model, "dataset": str(rows), "dataset_cache_dir": str(folder)}
    config = resolve(None, {}, (), values).config
    source = load.locate(config.model)
    tokenizer = load.load_tokenizer(source, config.model)
    start = time.monotonic()
    report = open_data(config, source, tokenizer).train_report
    return {"seconds": time.monotonic() - start, "rows": report.rows_used, "tokens": report.tokens,
            "supervised": report.trained_tokens}  # fmt: skip


def trl(model: str, rows: Path, folder: Path) -> dict[str, float]:
    """Tokenize as TRL's trainer does when it is made."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    seconds = 0.0

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            nonlocal seconds
            start = time.monotonic()
            prepared = super()._prepare_dataset(*arguments, **named)
            seconds += time.monotonic() - start
            return prepared

    def split(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    # The same rows in TRL's own form; making them is not timed.
    lines = [split(json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
    given = folder / "rows.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments = SFTConfig(
        output_dir=str(folder), max_length=2048, dataset_num_proc=len(os.sched_getaffinity(0)),
        bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    start = time.monotonic()
    data = datasets.load_dataset("json", data_files=str(given), cache_dir=str(folder / "cache"),
                                 split="train")  # fmt: skip
    seconds += time.monotonic() - start
    found = Timed(model=base, args=arguments, train_dataset=data, processing_class=tokenizer)
    lengths, supervised = 0, 0
    for row in found.train_dataset:
        lengths += len(row["input_ids"])
        supervised += sum(label != IGNORED for label in row["labels"])
    return {"seconds": seconds, "rows": len(found.train_dataset), "tokens": lengths,
            "supervised": supervised}  # fmt: skip


if __name__ == "__main__":
    contestant = {"lora-trainer": ours, "trl": trl}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as scratch:
        result = contestant(sys.argv[2], Path(sys.argv[3]), Path(scratch))
    Path(sys.argv[4]).write_text(json.dumps(result))
