"""What of test_prepare.py starts processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import psutil
import pytest

from lora_trainer.data.encoder import TokenizerFactory
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.data.tokenizer_pool import CHILD_PROGRAM
from lora_trainer.errors import (
    ConfigError,
    DataError,
    InternalError,
    MemoryKilledError,
)
from support.prepare import SECRET, pairs, run, save_tokenizer, texts, write


def is_tokenizing(process):
    """Until it has begun its own program, a child's memory is its parent's."""
    return process.cmdline()[-1:] == [CHILD_PROGRAM]


def tokenizing_processes():
    """Return the pool's processes: the fork servers of other tests are this process's too."""
    return [child for child in psutil.Process().children() if is_tokenizing(child)]


def test_all_cores_make_the_same_bytes_as_one_within_bounded_memory(tmp_path):
    spec = write(tmp_path / "d.jsonl", pairs(20_000))
    one, report = run(spec, tmp_path / "one", workers=1)
    this, peak, is_done = psutil.Process(), [0], threading.Event()

    def watch():
        while not is_done.wait(0.02):
            total = this.memory_info().rss
            for process in this.children(recursive=True):
                try:
                    if is_tokenizing(process):
                        total += process.memory_info().rss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    before = this.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        two, _ = run(spec, tmp_path / "two", workers=2)
    finally:
        is_done.set()
        watcher.join()
    assert two.digest == one.digest
    assert report.rows_used == 20_000
    assert before < peak[0] < before + 500_000_000
    assert not tokenizing_processes()


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_rows_are_reported_in_order_at_once(tmp_path, workers):
    path = tmp_path / "d.jsonl"
    lines = [json.dumps(row) for row in pairs(4000)]
    lines[10] = '{"prompt": "' + SECRET
    lines[20] = json.dumps({"prompt": SECRET, "completion": ""})
    lines[30] = json.dumps({"prompt": SECRET, "completion": "refused"})
    lines[3000] = "[]"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        run(SourceSpec(str(path)), tmp_path, workers=workers)
    problems = caught.value.problems
    assert problems[0].what == "4 of 4,000 rows cannot be used"
    assert [p.where for p in problems[1:]] == [f"{path}:{n}" for n in (11, 21, 31, 3001)]
    assert SECRET not in caught.value.block()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("word", "error"), [("config", ConfigError), ("crash", InternalError)])
def test_an_error_of_a_tokenizing_process_reaches_the_user(tmp_path, workers, word, error):
    spec = write(tmp_path / "d.jsonl", texts(*["fine"] * 3000, word))
    with pytest.raises(error) as caught:
        run(spec, tmp_path, workers=workers)
    assert SECRET not in caught.value.block()
    assert not tokenizing_processes()


def test_a_killed_tokenizing_process_is_explained(tmp_path):
    spec = write(tmp_path / "d.jsonl", texts(*["fine"] * 3000, "killed"))
    with pytest.raises(MemoryKilledError, match="killed twice") as caught:
        run(spec, tmp_path, workers=2)
    path = spec.path_or_id
    assert caught.value.problems[0].where == f"{path}:2561 to {path}:3001"
    assert not tokenizing_processes()


def test_a_tokenizing_process_killed_once_is_replaced_and_its_rows_done_again(tmp_path):
    rows = ["fine one", *["fine"] * 3000, "fine two"]
    whole, _ = run(write(tmp_path / "whole.jsonl", texts(*rows)), tmp_path, workers=2)
    rows[1500] = f"fine once={tmp_path / 'killed'}"
    spec = write(tmp_path / "d.jsonl", texts(*rows))
    killed, report = run(spec, tmp_path, workers=2)
    assert report.processes_restarted == 1
    assert report.rows_used == len(rows) == len(whole)
    assert [killed[n][0].tolist() for n in (0, 1499, 1501, 3001)] == [
        whole[n][0].tolist() for n in (0, 1499, 1501, 3001)
    ]
    assert not tokenizing_processes()


def test_conversations_go_through_the_models_own_tokenizer_in_every_process(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x hi"}]
    spec = write(tmp_path / "d.jsonl", [{"messages": messages}] * 2100)
    factory = TokenizerFactory(save_tokenizer(tmp_path / "model"))
    dataset, report = run(spec, tmp_path, workers=2, encoder=factory)
    ids, trained = dataset[2099]
    assert ids.tolist() == [0, 4, 3, 1, 0, 2, 5, 3, 1]
    assert trained.tolist() == [False] * 6 + [True] * 3
    assert report.trained_tokens == 2100 * 3


def test_preparing_imports_neither_torch_nor_other_heavy_libraries():
    program = (
        "import sys, lora_trainer.data.prepare; "
        "print(*{'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert answer.stdout.split() == []
