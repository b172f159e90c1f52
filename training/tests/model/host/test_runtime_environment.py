"""What PyTorch reads when it starts: the same for every command, for the worker, in every image."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lora_trainer.host.environment import (
    ALLOCATOR,
    CUDA_ENVIRONMENT,
    GENERIC_ALLOCATOR,
    set_defaults,
)
from support.checkout import TRAINING

COMPILERS = {"build-essential", "clang", "cuda-nvcc", "g++", "gcc", "tcc"}
COMPILED = """
import io, json, os, subprocess
from lora_trainer.cli import main
main(["schema"])
from pathlib import Path
from lora_trainer.config.schema import Config
from lora_trainer.run.protocol import WorkerSpec
from lora_trainer.supervise import workers

class Worker:
    pid, stdin, returncode = 1, io.BytesIO(), 0
    def __init__(self, command, env, **_):
        self.env = env
    def poll(self):
        return 0

workers.subprocess.Popen = Worker
spec = WorkerSpec(Config(), Path("out"), "run")
group = workers.WorkerGroup(spec, 1, log=subprocess.DEVNULL, pass_fds=(), environment={})
inherited = group._ranks[0].env
import torch
calls = []
compiled = torch.compile(torch.neg, backend=lambda graph, inputs: calls.append(1) or graph.forward)
compiled(torch.ones(2))
native = getattr(torch, "_native", None)  # torch 2.13 has it, 2.1 has not
print(json.dumps({
    "worker": inherited,
    "compilations": len(calls),
    "uses_triton": bool(native) and not native.common_utils.check_native_jit_disabled(),
}))
"""


def test_no_command_and_no_worker_compiles_a_kernel_at_run_time() -> None:
    kept = {k: v for k, v in os.environ.items() if k not in CUDA_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        check=True,
        env=kept | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["compilations"], seen["uses_triton"]) == (0, False)
    assert {name: seen["worker"].get(name) for name in CUDA_ENVIRONMENT} == CUDA_ENVIRONMENT


def test_images_have_neither_a_compiler_nor_a_temporary_folder_to_run_code_from() -> None:
    steps = (TRAINING / "Dockerfile").read_text().split("install --yes --no-install-recommends")[1:]
    installed = {name for step in steps for name in step.split(";")[0].replace("\\", "").split()}
    assert "tini" in installed
    assert not installed & COMPILERS
    compose = yaml.safe_load((TRAINING / "docker-compose.training.yml").read_text())
    # Docker mounts one with noexec, unless its options say exec.
    (mounted,) = compose["x-container"]["tmpfs"]
    assert "exec" not in re.split("[:,]", mounted)


@pytest.mark.parametrize("own", [ALLOCATOR, GENERIC_ALLOCATOR])
def test_users_allocator_settings_are_the_only_ones(own: str) -> None:
    environ = {own: "max_split_size_mb:128"}
    set_defaults(environ)
    assert {environ.get(ALLOCATOR), environ.get(GENERIC_ALLOCATOR)} == {
        "max_split_size_mb:128",
        None,
    }


def test_installed_torch_reads_the_allocators_variable() -> None:
    libraries = (Path(torch.__file__).parent / "lib").glob("libc10*.so*")
    assert any(ALLOCATOR.encode() in library.read_bytes() for library in libraries)
