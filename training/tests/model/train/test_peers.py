"""The lead over Trainer + PEFT does not shrink: `bench/peers.py --quick`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).resolve().parents[3] / "bench/peers.py"

pytestmark = pytest.mark.any_stack


def test_a_step_costs_no_more_beside_trainer_and_peft_than_recorded():
    done = subprocess.run(
        [sys.executable, PEERS, "--quick"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times this project's" in done.stdout
