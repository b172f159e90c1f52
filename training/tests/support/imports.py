"""What test_imports.py shares with other tests."""

from __future__ import annotations

from pathlib import Path

import lora_trainer

SOURCE = Path(lora_trainer.__file__).parent


def files() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {dotted(path) for path in files()}
