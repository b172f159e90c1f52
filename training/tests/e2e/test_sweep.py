"""The sweep of docs/runs.md, as it is written there, on the tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.trainer import SECONDS, Trainer

pytestmark = pytest.mark.any_stack
PAGE = Path(__file__).resolve().parents[3] / "docs" / "runs.md"
COMMAND = f'#!/bin/sh\nexec {sys.executable} -m lora_trainer "$@"\n'


def test_sweep_of_the_documentation_runs_as_it_is_written(tmp_path: Path):
    trainer = Trainer(tmp_path)
    small = {"max_steps": 4, "eval_steps": 4, "save_steps": 4, "output_dir": str(tmp_path / "out")}
    (tmp_path / "sweep.json").write_text(json.dumps(trainer.settings | small))
    command = tmp_path / "bin" / "lora-trainer"
    command.parent.mkdir()
    command.write_text(COMMAND)
    command.chmod(0o755)
    recipe = re.findall(r"<!-- sweep -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    environment = trainer.environment() | {"LORA_OUTPUTS": str(tmp_path / "out")}
    environment["PATH"] = f"{command.parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", recipe],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("lr-")}
    assert set(listed) >= {"lr-1e-3", "lr-1e-2"}
    assert "exit code" not in done.stdout
    assert re.search(r"learning_rate +0\.001 +0\.01", done.stdout)
    assert (tmp_path / "comparison.html").read_text().count("polyline class") == 8
