"""What bench/wire.py predicts is what real steps send between network namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support.checkout import TRAINING

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]


def measured(*options: str) -> dict[str, Any]:
    command = [sys.executable, str(TRAINING / "bench" / "wire.py"), "--measure", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_step_sends_as_many_bytes_as_predicted(hosts: int) -> None:
    result = measured("--hosts", str(hosts), "--steps", "2")
    assert result["bytes"] == pytest.approx(result["predicted_bytes"], rel=0.05)


@pytest.mark.parametrize("gbit", [0.1, 0.25])
def test_a_limited_link_takes_as_long_as_predicted(gbit: float) -> None:
    result = measured("--gbit", str(gbit), "--steps", "2")
    assert result["seconds"] == pytest.approx(result["predicted_seconds"], rel=0.15)
