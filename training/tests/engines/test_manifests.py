"""The manifests are valid by the published schemas, which reject unknown fields."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.checkout import TRAINING

pytestmark = [pytest.mark.any_stack, pytest.mark.timeout(900)]
DEPLOY = TRAINING / "deploy"
PythonWith = Callable[[str], Path]
KUBERNETES = """\
import sys, yaml
from kubernetes_validate import validate
validate(yaml.safe_load(open(sys.argv[1])), "1.37", strict=True)
"""
SKYPILOT = """\
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
assert resources.use_spot and resources.accelerators == {"L4": 1}, resources
"""


def run(python: Path, script: str, *files: str, home: Path) -> None:
    paths = [str(DEPLOY / file) for file in files]
    done = subprocess.run(
        [python, "-c", script, *paths],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        cwd=TRAINING.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_job_is_valid_for_kubernetes(python_with: PythonWith, tmp_path: Path) -> None:
    python = python_with("kubernetes-validate")
    run(python, KUBERNETES, "kubernetes/job.yaml", home=tmp_path)


def test_the_task_is_valid_for_skypilot(python_with: PythonWith, tmp_path: Path) -> None:
    run(python_with("skypilot"), SKYPILOT, "skypilot/train.yaml", home=tmp_path)
