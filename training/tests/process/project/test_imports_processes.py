"""What of test_imports.py starts processes."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from support.imports import MODULES, SOURCE

MAJOR = int(importlib.metadata.version("transformers").split(".")[0])
# Importing torch takes seconds: the supervisor answers before the worker has it.
LIGHT = ("config", "run", "serve", "supervise", "report", "commands")
LIGHT += ("cli", "plan", "memory_estimate", "redaction", "units", "errors", "faults", "machine")
LIGHT += ("invocation", "api", "run_folder")
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib")


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
