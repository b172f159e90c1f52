"""Imports point downwards, and what must answer at once imports no torch."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support.imports import MODULES, SOURCE, dotted, files

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
    *(
        "config",
        "run",
        "remote",
        "memory_estimate",
        "batch",
        "plan",
        "data",
        "report",
        "model",
        "train",
    ),
    *("serve", "supervise", "commands", "api", "cli", "__main__"),
]


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
