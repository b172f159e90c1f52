"""Every preset under configs/, by the real command line, on the embedded model: a few steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer.config.schema import EMBEDDED_MODEL
from lora_trainer.model import quantize
from lora_trainer.run.events import StepDone, parse_line
from support.checkout import TRAINING

PRESETS = sorted((TRAINING / "configs").glob("*.json"))
STEPS = 3
SCALED = {
    "model_name_or_path": EMBEDDED_MODEL,
    "eval_dataset": None,
    "max_steps": STEPS,
    "max_seq_length": 256,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.0,
    "learning_rate": 0.002,
    "logging_steps": 1,
    "eval_steps": 0,
    "bf16": False,
    "report_to": [],
    "health_port": 0,
}
# What a stack changes is in the default job, and in what test_presets.py asks of the same files.
pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_trains_the_embedded_model(preset: Path, tmp_path: Path) -> None:
    model = json.loads(preset.read_text())["model"]
    if model.get("use_4bit") and not quantize.works_on_cpu():
        pytest.skip("this stack's bitsandbytes does not train on a CPU")
    settings = SCALED | {"output_dir": str(tmp_path), "run_name": "run"}
    if preset.stem == "multi-gpu":
        # Here each GPU is a core.
        settings |= {"nproc": 2, "train_batch_size": 4}
    done = subprocess.run(
        [sys.executable, TRAINING / "train_lora.py", "--config", preset]
        + [
            part
            for key, value in settings.items()
            for part in ("--set", f"{key}={json.dumps(value)}")
        ],
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run/events.jsonl").read_text().splitlines()
    losses = [e.loss for e in map(parse_line, lines) if isinstance(e, StepDone)]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["processes"] == settings.get("nproc", 1)
    assert (tmp_path / "run/final_model/adapter_model.safetensors").stat().st_size > 0
