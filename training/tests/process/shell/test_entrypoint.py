"""The container's entrypoint hands over to the trainer, which checks what Docker gave it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer.main

from lora_trainer.cli import app
from lora_trainer.commands import container
from lora_trainer.errors import AccessError, ConfigError, UnavailableError
from lora_trainer.machine import Gpu, Machine
from support.checkout import TRAINING

pytestmark = pytest.mark.any_stack


def entrypoint(root: Path, *arguments: str, **environment: str) -> str:
    """Run the entrypoint over a trainer that prints what it was started as."""
    tools = root / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "lora-trainer").write_text('#!/bin/sh\necho "$LORA_CONTAINER:" "$@"\n')
    (tools / "lora-trainer").chmod(0o755)
    return subprocess.run(
        [shutil.copy(TRAINING / "docker-entrypoint.sh", root), *arguments],
        env={"PATH": f"{tools}:/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        ((), "train: train\n"),
        (("--max_steps", "2"), "train: train --max_steps 2\n"),
        (("preflight", "--max_steps", "2"), "preflight: check --quick --max_steps 2\n"),
        (("check", "--rows", "1"), "train: check --rows 1\n"),
        (("merge", "a", "b"), ": merge a b\n"),
        (("echo", "1"), "1\n"),
    ],
)
def test_entrypoint_starts_the_command(
    tmp_path: Path, arguments: tuple[str, ...], started: str
) -> None:
    assert entrypoint(tmp_path, *arguments) == started


@pytest.mark.parametrize("command", sorted(vars(typer.main.get_command(app))["commands"]))
def test_entrypoint_knows_every_command_of_the_trainer(tmp_path: Path, command: str) -> None:
    assert entrypoint(tmp_path, command, "a").endswith(f": {command} a\n")


def test_entrypoint_drops_secrets_that_are_empty_and_hands_wandb_its_own(tmp_path: Path) -> None:
    empty, key = tmp_path / "empty", tmp_path / "key"
    empty.write_text("")
    key.write_text("k3y\n")
    names = {"HF_TOKEN_FILE": str(empty), "HF_TOKEN": "", "WANDB_API_KEY_FILE": str(key)}
    names |= {"AWS_SHARED_CREDENTIALS_FILE": str(empty), "GOOGLE_APPLICATION_CREDENTIALS": str(key)}
    seen = entrypoint(tmp_path, "env", **names)
    assert "AWS_SHARED_CREDENTIALS_FILE" not in seen
    assert f"GOOGLE_APPLICATION_CREDENTIALS={key}\n" in seen
    assert "HF_TOKEN" not in seen
    assert "WANDB_API_KEY=k3y\n" in seen


@pytest.mark.parametrize(
    ("status", "options", "code"),
    [(200, (), 0), (503, (), 1), (503, ("--alive",), 0), (None, (), 1), (None, ("--alive",), 1)],
)
def test_healthcheck_asks_the_status_server(
    status: int | None, options: tuple[str, ...], code: int
) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 500)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        source, port = str(TRAINING / "src"), str(server.server_port if status else free_port())
        done = subprocess.run(
            [TRAINING / "docker-entrypoint.sh", "healthcheck", *options],
            env={"PATH": "/usr/bin:/bin", "LORA_SOURCE": source, "HEALTH_PORT": port},
            capture_output=True,
            text=True,
            check=False,
        )
        if status is None:
            socket.create_connection(server.server_address).close()
        thread.join()
    assert done.returncode == code
    assert "/health" in done.stdout if status else f"no answer on port {port}" in done.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container's mounts, on a machine without GPU and with enough shared memory."""
    for name in ("datasets", "outputs", "models", "logs"):
        (tmp_path / name).mkdir()
    has(monkeypatch, gpu=False, driver=False)
    monkeypatch.setattr(container, "LEAST_SHARED_BYTES", 0)
    return tmp_path


def has(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, driver: bool) -> None:
    gpus = (Gpu(0, "H100", 80 << 30, (9, 0)),) if gpu else ()
    monkeypatch.setattr(container, "read_machine", lambda: Machine(2, 1 << 34, gpus, "580.1"))
    monkeypatch.setattr(container.shutil, "which", lambda _: "nvidia-smi" if driver else None)


def given(workspace: Path, **environment: str) -> dict[str, str]:
    return {"LORA_WORKSPACE": str(workspace), "LORA_CONTAINER": "train"} | environment


def test_the_default_config_is_taken_where_none_is_mounted(workspace: Path) -> None:
    default = workspace / "default.json"
    default.write_text("{}")
    environ = given(workspace, LORA_DEFAULT_CONFIG=str(default))
    config, why = container.find_config(environ)
    assert (config, config.read_text()) == (workspace / "config.json", "{}")
    assert "no config file is mounted" in why
    assert container.find_config(environ) == (config, "")


@pytest.mark.parametrize(
    ("name", "environment", "remedy"),
    [("config.json", {}, "rmdir"), ("absent", {"LORA_TRAINER_CONFIG": "/absent"}, "mount it: -v")],
)
def test_a_config_that_is_not_a_file_is_refused_with_its_remedy(
    workspace: Path, name: str, environment: dict[str, str], remedy: str
) -> None:
    (workspace / name).mkdir()
    with pytest.raises(ConfigError) as error:
        container.find_config(given(workspace, **environment))
    assert remedy in error.value.block()


@pytest.mark.parametrize(
    ("driver", "stack", "warning"),
    [(False, "cu121", "no GPU is visible"), (True, "cu121", "no GPU answers"), (False, "cpu", "")],
)
def test_without_a_gpu_training_is_on_the_cpu_unless_one_is_required(
    workspace: Path, driver: bool, stack: str, warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, gpu=False, driver=driver)
    environ = given(workspace, LORA_STACK=stack)
    warnings = container.check_container(environ)
    assert [warning in one for one in warnings] == ([True] if warning else [])
    if warning:
        with pytest.raises(UnavailableError, match=warning):
            container.check_container(environ | {"LORA_REQUIRE_GPU": "1"})


def test_a_gpu_that_is_there_or_hidden_is_no_reason_to_warn(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = given(workspace, LORA_STACK="cu121", LORA_REQUIRE_GPU="1")
    has(monkeypatch, gpu=True, driver=True)
    assert container.check_container(environ) == []
    has(monkeypatch, gpu=False, driver=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert container.check_container(environ) == []


DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (me@x)\n"


@pytest.mark.parametrize(
    ("driver", "stack", "refusal"),
    [
        (
            None,
            "cu121",
            "docker compose -f docker-compose.training.yml -f docker-compose.cpu.yml up",
        ),
        (None, "cpu", "docker compose -f docker-compose.training.yml -f docker-compose.cpu.yml up"),
        ("470.82.01", "cu121", "it is 470.82.01, and 525 is required"),
        ("535.104.05", "cu121", ""),
        ("470.82.01", "cpu", ""),
    ],
)
def test_preflight_without_a_gpu_looks_at_the_hosts_driver(
    workspace: Path, driver: str | None, stack: str, refusal: str
) -> None:
    version = workspace / "version"
    if driver is not None:
        version.write_text(DRIVER.format(driver))
    environ = given(workspace, LORA_NVIDIA_VERSION=str(version), LORA_STACK=stack)
    environ |= {"LORA_CONTAINER": "preflight", "LORA_GPU_RESERVED": "1"}
    if refusal:
        with pytest.raises(UnavailableError) as error:
            container.check_container(environ)
        assert refusal in error.value.block()
    else:
        (note,) = container.check_container(environ)
        assert "nvidia-ctk runtime configure" in note


def test_little_shared_memory_is_a_warning(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "LEAST_SHARED_BYTES", 1 << 60)
    (warning,) = container.check_container(given(workspace))
    assert "--shm-size 8g" in warning


UNKNOWN, OWN = 54321, 1234
AS_OWN_USER = """
import os, sys
from lora_trainer.commands import container
from lora_trainer.errors import AccessError
os.setgroups([]); os.setgid({own}); os.setuid({own})
try:
    container.check_container(os.environ)
except AccessError as error:
    sys.exit(error.block())
"""


@pytest.mark.parametrize(
    ("owner", "environment", "remedy"),
    [
        (
            UNKNOWN,
            {"LORA_HOST_OUTPUTS": "../out", "LORA_STACK": "cu121"},
            f"LORA_UID={UNKNOWN} LORA_GID={UNKNOWN} docker compose -f docker-compose.training.yml",
        ),
        (UNKNOWN, {}, f"docker run --user {UNKNOWN}:{UNKNOWN}"),
        (0, {"LORA_HOST_OUTPUTS": "../out"}, f"sudo chown -R {OWN}:{OWN} "),
        (UNKNOWN, {"LORA_HOST_BY": "run.sh"}, f"sudo chown -R {OWN}:{OWN} "),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders to others")
def test_folders_of_another_user_end_with_the_exact_command(
    workspace: Path, owner: int, environment: dict[str, str], remedy: str
) -> None:
    for name in ("outputs", "models"):
        os.chown(workspace / name, owner, owner)
    os.chown(workspace / "logs", OWN, OWN)
    for folder in (workspace, *workspace.parents[:-2]):  # every user may reach them
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", AS_OWN_USER.format(own=OWN)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
        | given(workspace, **environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert remedy in done.stderr
    if "chown" in remedy:
        assert f"{workspace / 'outputs'} {workspace / 'models'}\n" in done.stderr


def test_a_mount_that_is_only_for_reading_ends_with_77(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(container.tempfile, "TemporaryFile", refuse)
    with pytest.raises(AccessError) as error:
        container.check_container(given(workspace))
    assert error.value.exit_code == 77
    assert "mounted read-only" in error.value.block()
