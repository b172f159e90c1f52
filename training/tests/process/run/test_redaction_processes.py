"""What of test_redaction.py starts processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lora_trainer.redaction import Redaction
from lora_trainer.supervise.log_filter import open_log
from support.redaction import CANARY


def test_log_goes_on_after_the_process_that_opened_it_was_stopped(tmp_path):
    # What the worker prints while the supervisor is stopped must not block the worker.
    path = tmp_path / "train.log"
    with open_log(path, Redaction([CANARY])) as log:
        done = subprocess.run(
            [sys.executable, "-c", f"print('{CANARY}'); print('x' * 300_000)"],
            stdout=log, check=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
    text = path.read_text()
    assert text.startswith("***\nxxx")
    assert len(text) == 4 + 300_001


def test_log_on_a_full_disk_loses_lines_and_blocks_nobody():
    warned = []
    with open_log(Path("/dev/full"), Redaction(), warned.append) as log:
        assert os.write(log, b"a line\n" * 9000) == 63_000
        assert os.write(log, b"a line\n" * 9000) == 63_000
    assert warned == ["full is incomplete: writing to disk failed"]


def test_log_that_cannot_be_opened_costs_a_warning_alone(tmp_path):
    warned = []
    with open_log(tmp_path, Redaction(), warned.append) as log:
        os.write(log, b"a line\n")
    assert warned == [f"{tmp_path.name} is not written: Is a directory"]
