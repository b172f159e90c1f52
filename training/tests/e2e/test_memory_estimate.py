"""Forty combinations of model, batch and precision take the memory that the plan counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TRAINING = Path(__file__).resolve().parents[2]


def test_forty_combinations_take_what_is_counted():
    done = subprocess.run(
        [sys.executable, "bench/memory.py", "measured"],
        cwd=TRAINING,
        env={"PYTHONPATH": "src", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 40
