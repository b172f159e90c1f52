"""The container's entrypoint over a folder, with a trainer that prints its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import TRAINING

pytestmark = pytest.mark.any_stack


def entrypoint(
    root: Path, *arguments: str, user: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint, as another user where one is given."""
    tools = root / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "lora-trainer").write_text('#!/bin/sh\necho "$@"\n')
    (tools / "lora-trainer").chmod(0o755)
    for name in ("datasets", "outputs", "models", "logs"):
        (root / "workspace" / name).mkdir(parents=True, exist_ok=True)
    default = root / "default.json"
    default.write_text("{}")
    given = {"LORA_WORKSPACE": str(root / "workspace"), "LORA_DEFAULT_CONFIG": str(default)}
    return subprocess.run(
        [shutil.copy(TRAINING / "docker-entrypoint.sh", root), *arguments],
        env={"PATH": f"{tools}:/usr/bin:/bin"} | given | environment,
        capture_output=True,
        text=True,
        check=False,
        **({} if user is None else {"user": user, "group": user, "extra_groups": []}),
    )


def test_entrypoint_writes_the_default_config_where_none_is_mounted(tmp_path: Path) -> None:
    done = entrypoint(tmp_path, "--max_steps", "2")
    config = tmp_path / "workspace" / "config.json"
    assert done.stdout == f"train --config {config} --max_steps 2\n"
    assert config.read_text() == "{}"


def with_gpu(root: Path, line: str) -> None:
    (root / "tools").mkdir()
    (root / "tools" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\n")
    (root / "tools" / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(
    ("gpu", "stack", "said"),
    [(None, "cu121", "no GPU is visible"), ("", "cu121", "no GPU answers"), (None, "cpu", "")],
)
def test_without_a_gpu_training_is_on_the_cpu_unless_one_is_required(
    tmp_path: Path, gpu: str | None, stack: str, said: str
) -> None:
    if gpu is not None:
        with_gpu(tmp_path, gpu)
    warned = entrypoint(tmp_path, LORA_STACK=stack)
    assert warned.returncode == 0, warned.stderr
    assert (said in warned.stderr) if said else ("GPU" not in warned.stderr)
    required = entrypoint(tmp_path, LORA_STACK=stack, LORA_REQUIRE_GPU="1")
    assert required.returncode == (69 if said else 0)


@pytest.mark.parametrize(
    ("gpu", "stack", "said"),
    [
        ("470.82.01, 8.6", "cu121", "the driver is too old"),
        ("535.104.05, 8.6", "current", "the driver is too old"),
        ("580.65.06, 12.0", "cu121", "does not serve this GPU"),
        ("580.65.06, 7.0", "current", "does not serve this GPU"),
        ("535.104.05, 8.6", "cu121", ""),
    ],
)
def test_a_gpu_that_the_stack_does_not_serve_ends_the_run(
    tmp_path: Path, gpu: str, stack: str, said: str
) -> None:
    with_gpu(tmp_path, gpu)
    done = entrypoint(tmp_path, LORA_STACK=stack)
    assert done.returncode == (69 if said else 0), done.stderr
    assert said in done.stderr
    left_alone = entrypoint(tmp_path, LORA_STACK=stack, CUDA_VISIBLE_DEVICES="")
    assert left_alone.returncode == 0


DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (me@x)\n"


@pytest.mark.parametrize(
    ("driver", "code", "said"),
    [
        (None, 69, "docker compose -f docker-compose.training.yml -f docker-compose.cpu.yml up"),
        ("470.82.01", 69, "it is 470.82.01, needed is 525"),
        ("535.104.05", 0, "nvidia-ctk runtime configure"),
    ],
)
def test_preflight_without_a_gpu_looks_at_the_hosts_driver(
    tmp_path: Path, driver: str | None, code: int, said: str
) -> None:
    version = tmp_path / "version"
    if driver is not None:
        version.write_text(DRIVER.format(driver))
    given = {"LORA_STACK": "cu121", "LORA_NVIDIA_VERSION": str(version)}
    done = entrypoint(tmp_path, "preflight", **given, LORA_GPU_RESERVED="1")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert entrypoint(tmp_path, "preflight", **given).returncode == 0  # training on the CPU
    # Docker fails alike where the image is the cpu stack's and the reservation is there.
    done = entrypoint(tmp_path, "preflight", **given | {"LORA_STACK": "cpu"}, LORA_GPU_RESERVED="1")
    assert done.returncode == (69 if driver is None else 0)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A folder in a place that every user may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


UNKNOWN = 54321


@pytest.mark.parametrize(
    ("owner", "environment", "remedy"),
    [
        (
            UNKNOWN,
            {"LORA_HOST_OUTPUTS": "../out", "LORA_STACK": "cu121"},
            f"LORA_UID={UNKNOWN} LORA_GID={UNKNOWN} docker compose -f docker-compose.training.yml",
        ),
        (UNKNOWN, {}, f"docker run --user {UNKNOWN}:{UNKNOWN}"),
        (0, {"LORA_HOST_OUTPUTS": "../out"}, "sudo chown -R 1234:1234 ../out {models}"),
        (
            UNKNOWN,
            {"LORA_HOST_OUTPUTS": "/host/out", "LORA_HOST_BY": "run.sh"},
            "sudo chown -R 1234:1234 /host/out {models}",
        ),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders to others")
def test_folders_of_another_user_end_with_the_exact_command(
    public_path: Path, owner: int, environment: dict[str, str], remedy: str
) -> None:
    workspace = public_path / "workspace"
    for name in ("outputs", "models", "logs"):
        (workspace / name).mkdir(parents=True)
        os.chown(workspace / name, owner, owner)
    os.chown(workspace / "logs", 1234, 1234)
    done = entrypoint(public_path, "preflight", user=1234, **environment)
    assert done.returncode == 77, done.stderr
    models = workspace / "models"
    assert f"remedy: {remedy.format(models=models)}" in done.stderr.replace(
        "on the host: ", ""
    ).replace("train as their owner: ", "")


def test_entrypoint_drops_secrets_that_are_empty_and_hands_wandb_its_own(tmp_path: Path) -> None:
    empty, key = tmp_path / "empty", tmp_path / "key"
    empty.write_text("")
    key.write_text("k3y\n")
    names = {"HF_TOKEN_FILE": str(empty), "HF_TOKEN": "", "WANDB_API_KEY_FILE": str(key)}
    seen = entrypoint(tmp_path, "env", **names).stdout
    assert "HF_TOKEN" not in seen
    assert "WANDB_API_KEY=k3y\n" in seen
