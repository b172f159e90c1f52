"""What test_scratch.py shares with other tests."""

from __future__ import annotations

from pathlib import Path

from lora_trainer.model import embedded


def making(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"{embedded.MAKING}*"))
