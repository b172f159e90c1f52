"""Imports point downwards, and what must answer at once imports no torch."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_trainer

MAJOR = int(importlib.metadata.version("transformers").split(".")[0])
SOURCE = Path(lora_trainer.__file__).parent
# The folders, and the files beside them, from the lowest up: each imports only those before it.
LEVELS = [
    *(
        "redaction",
        "units",
        "host",
        "errors",
        "faults",
        "machine",
        "checkpoint_folder",
        "run_folder",
    ),
    "invocation",
    *("config", "run", "memory_estimate", "plan", "data", "report", "model", "train"),
    *("serve", "supervise", "commands", "api", "cli", "__main__"),
]
# Importing torch takes seconds: the supervisor answers before the worker has it.
LIGHT = ("config", "run", "serve", "supervise", "report", "commands")
LIGHT += ("cli", "plan", "memory_estimate", "redaction", "units", "errors", "faults", "machine")
LIGHT += ("invocation", "api", "run_folder")
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib")


def files() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {dotted(path) for path in files()}


def imports_of(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, at any depth of nesting."""
    package = ("lora_trainer", *path.relative_to(SOURCE).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return {n.removeprefix("lora_trainer.") for n in names} & MODULES


@pytest.mark.parametrize("path", files(), ids=dotted)
def test_imports_point_downwards(path):
    own = dotted(path).split(".")[0]
    assert own in LEVELS, "a new folder needs its level"
    for name in {module.split(".")[0] for module in imports_of(path)} - {own}:
        assert LEVELS.index(name) < LEVELS.index(own), f"{own} must not import {name}"


def test_no_modules_import_each_other():
    TopologicalSorter({dotted(path): imports_of(path) for path in files()}).prepare()


@pytest.mark.parametrize(
    "folders, heavy",
    [
        (LIGHT, HEAVY),
        # Each of the processes that tokenize would hold 117 MB more with torch, which transformers
        # 4 imports with its chat templates: there the processes hide it.
        (("data",), ("torch", "peft") if MAJOR >= 5 else ("peft",)),
    ],
)
def test_folders_without_torch_import_nothing_heavy(folders, heavy):
    modules = [name for name in sorted(MODULES) if name.split(".")[0] in folders]
    code = (
        "import sys, importlib\n"
        f"for name in {modules}: importlib.import_module('lora_trainer.' + name)\n"
        f"sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SOURCE.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
