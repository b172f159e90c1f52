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
job, runtime = (yaml.safe_load(open(path)) for path in sys.argv[1:])
node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
validate(job, "1.37", strict=True)
validate({"apiVersion": "batch/v1", "kind": "Job", "spec": node["spec"]}, "1.37", strict=True)
"""
# The models drop fields that they do not know, and add defaults.
KUBEFLOW = """\
import sys, yaml
from kubeflow_trainer_api import models

def check(given, kept, path):
    if isinstance(given, dict):
        for key in given:
            assert key in kept, f"{path}.{key} is unknown"
            check(given[key], kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        for number, pair in enumerate(zip(given, kept, strict=True)):
            check(*pair, f"{path}[{number}]")
    else:
        assert given == kept, path

for path, name in zip(sys.argv[1:], ("TrainingRuntime", "TrainJob"), strict=True):
    given = yaml.safe_load(open(path))
    model = getattr(models, f"TrainerV1alpha1{name}").from_dict(given)
    check(given, model.to_dict(), name)
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


def test_the_job_and_the_pods_are_valid_for_kubernetes(
    python_with: PythonWith, tmp_path: Path
) -> None:
    python = python_with("kubernetes-validate")
    run(python, KUBERNETES, "kubernetes/job.yaml", "kubeflow/runtime.yaml", home=tmp_path)


def test_runtime_and_train_job_are_valid_for_kubeflow_trainer(
    python_with: PythonWith, tmp_path: Path
) -> None:
    python = python_with("kubernetes-validate")
    run(python, KUBEFLOW, "kubeflow/runtime.yaml", "kubeflow/trainjob.yaml", home=tmp_path)


def test_the_task_is_valid_for_skypilot(python_with: PythonWith, tmp_path: Path) -> None:
    run(python_with("skypilot"), SKYPILOT, "skypilot/train.yaml", home=tmp_path)
