"""Data flows one way, and what must answer at once imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_trainer

SOURCE = Path(lora_trainer.__file__).parent
# Each module may import the layers above its own, and its own layer only where said.
LAYERS = [
    {"quoting", "interrupts", "mounts"},
    {"errors", "aliases", "compat", "gate", "connections", "disk", "scratch"},
    {"config", "machine", "events", "faults", "silence"},
    {"redaction", "ranks", "stacks", "checkpoint_folder", "unrecorded"},
    {
        "sources",
        "status",
        "health",
        "history",
        "curves",
        "plan",
        "terminal",
        "wording",
        "streams",
        "memory",
        "smaller",
    },
    {
        "data",
        "model",
        "optim",
        "checkpoint",
        "card",
        "output",
        "precision",
        "trackers",
        "group",
    },
    {
        "checkpoint_store",
        "evaluate",
        "report",
        "display",
        "live",
        "hardware",
        "logfile",
        "meter",
    },
    {"views", "exposition", "transcript", "restarts", "endings", "finite", "initial"},
    {"export", "recovery"},
    {"fitting"},
    {"web"},
    {"server"},
    {"loop"},
    {"identity"},
    {"earlier_run"},
    {"dataset", "watch", "claim"},
    {"preview", "card_facts"},
    {"session", "target", "trained"},
    {"worker", "check", "chat", "comparison", "extract", "merge"},
    {"supervisor", "viewer"},
    {"cli"},
    {"__main__"},
]
# Layers whose modules build on one another; elsewhere neighbours do not know each other.
OPEN_LAYERS = {4}
LIGHT = ["cli", "supervisor", "sources", "status", "display", "report", "check", "plan", "worker"]
LIGHT += ["live", "hardware", "views", "web", "server", "connections", "logfile", "exposition"]
LIGHT += ["viewer", "transcript", "unrecorded", "checkpoint_folder"]
LIGHT += ["chat", "comparison", "extract", "merge", "target", "trained"]


def top_modules() -> dict[str, int]:
    return {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Return the top modules of this package that a file imports, at any depth of nesting."""
    package = ("lora_trainer", *path.relative_to(SOURCE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("lora_trainer.")}
    return found & top_modules().keys()


def files() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]


def top_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    levels = top_modules()
    own = top_of(path)
    assert own in levels, "a new module needs its place in LAYERS"
    for name in imports_of(path) - {own}:
        is_above = levels[name] < levels[own]
        is_neighbour = levels[name] == levels[own] and levels[own] in OPEN_LAYERS
        assert is_above or is_neighbour, f"{own} must not import {name}"


def test_what_answers_at_once_imports_no_torch():
    code = (
        f"import sys; [__import__('lora_trainer.' + n) for n in {LIGHT}]; "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
