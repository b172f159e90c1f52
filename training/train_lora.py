#!/usr/bin/env python3
"""Train a LoRA adapter: `python train_lora.py [--config config.json]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from lora_trainer.__main__ import main

if __name__ == "__main__":
    sys.exit(main("train"))
