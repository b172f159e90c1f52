"""A container that trains: who it is, what it may, what it sees, who reaches it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

import pytest

from support.composed import UID, Project, docker, health_check

pytestmark = [pytest.mark.timeout(1800)]
TOKEN = "hf_canary_of_the_run"


@pytest.fixture(scope="module")
def project(make_project) -> Iterator[Project]:
    project = make_project(
        "running",
        max_steps=1_000_000,
        save_steps=1000,
        stall_timeout_seconds=20,
        health_linger_seconds=120,
        max_restarts=0,
    )
    token = project.root / "hf_token"
    token.write_text(TOKEN)
    os.chown(token, UID, UID)
    token.chmod(0o400)
    project.environment["HF_TOKEN_FILE"] = str(token)
    assert project.up() == 0
    return project


def test_container_is_healthy_within_ten_seconds(project):
    project.wait(lambda: project.state()["Health"]["Status"] == "healthy", "healthy", 30)
    first = project.state()["Health"]["Log"][0]
    began = project.inside("stat", "-c", "%Y", "/proc/1")
    assert first["ExitCode"] == 0, first
    ended = project.inside("date", "--date", first["End"].rpartition(" ")[0], "+%s")
    assert int(ended) - int(began) <= 10


def test_container_runs_as_the_caller_with_no_capability_and_no_way_to_gain_one(project):
    status = project.inside("cat", "/proc/1/status")
    assert re.search(rf"Uid:\s+{UID}\s+{UID}\s+{UID}", status)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert re.search(rf"{name}:\s+0+\n", status), name
    assert re.search(r"NoNewPrivs:\s+1", status)
    assert re.search(r"Seccomp:\s+2", status)


def test_nothing_can_be_written_but_the_mounts_and_tmpfs(project):
    """access(2), which find asks, knows read-only file systems; /proc has the process's own."""
    search = "find / -path /proc -prune -o -not -type l -writable -print 2>/dev/null; true"
    written = project.inside("bash", "-c", search).splitlines()
    mounts = ("/tmp", "/dev", "/workspace/outputs", "/workspace/models", "/workspace/logs")
    # Secrets that are not given are /dev/null.
    unset = ("wandb_api_key", "health_token", "aws_credentials", "google_credentials")
    allowed = [*mounts, *(f"/run/secrets/{name}" for name in unset)]
    assert set(mounts[2:]) <= set(written)
    assert [path for path in written if not path.startswith(tuple(allowed))] == []
    for folder in ("/", "/opt/trainer/src", "/opt/venv", "/workspace", "/workspace/datasets"):
        refused = project.inside("bash", "-c", f"touch {folder}/.probe 2>&1; true")
        assert "Read-only file system" in refused


def test_container_sees_its_limits(project):
    host = project.inspect()["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 16 << 30
    assert host["ShmSize"] == 8 << 30
    assert host["PidsLimit"] == 1024
    assert host["CpuQuota"] / host["CpuPeriod"] == 4  # of those that the machine has
    megabytes = project.inside("df", "-Pm", "/dev/shm").splitlines()[1].split()[1]
    assert int(megabytes) == 8192
    script = (
        "from lora_trainer.machine import read_machine as read\n"
        "print(read().memory_bytes, read().cores)"
    )
    memory, cores = map(int, project.inside("python3", "-c", script).split())
    assert memory <= 16 << 30
    assert cores == min(4, os.cpu_count() or 1)


def test_server_answers_on_this_host_alone(project):
    assert project.ask("/health")["status"] == "healthy"
    bindings = project.inspect()["NetworkSettings"]["Ports"]["8080/tcp"]
    assert [binding["HostIp"] for binding in bindings] == ["127.0.0.1"]
    others = {
        info[4][0]
        for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        if not info[4][0].startswith("127.")
    } | {_gateway(project)}
    for address in others:
        with socket.socket() as client:
            client.settimeout(2)
            assert client.connect_ex((address, project.port)) != 0, address


def _gateway(project: Project) -> str:
    """Return the host's own address on the container's network."""
    networks = project.inspect()["NetworkSettings"]["Networks"].values()
    return next(network["Gateway"] for network in networks)


def test_a_second_run_in_the_same_folder_is_refused_by_preflight(project, make_project):
    second = make_project("second")
    second.environment["LORA_OUTPUTS"] = str(project.root / "outputs")
    project.wait(lambda: project.step() > 0, "the first step")
    assert second.up() == 75
    assert second.state()["Status"] == "created"
    assert "another run is using this output folder" in second.logs("preflight")


def test_what_the_container_prints_are_the_hosts_names(project):
    project.wait(lambda: project.step() > 0, "the first step")
    assert f"status: http://127.0.0.1:{project.port}" in project.logs()
    assert "/workspace/" not in project.logs()


def test_the_log_is_rotated(project, make_project):
    log = project.inspect()["HostConfig"]["LogConfig"]
    assert log == {"Type": "json-file", "Config": {"max-file": "5", "max-size": "10m"}}
    other = make_project("rotating")
    other.environment |= {"LORA_LOG_SIZE": "100k", "LORA_LOG_FILES": "2"}
    name = f"{other.name}-counting"
    command = ("trainer", "seq", "1", "20000")  # 1.6 MB of json-file
    other.compose("run", "--detach", "--no-deps", "--name", name, *command)
    assert docker("wait", name).stdout.strip() == "0"
    kept = docker("logs", name).stdout.split()
    assert kept[-1] == "20000"
    assert 500 < len(kept) < 4000


def test_secrets_are_in_a_file_and_nowhere_else(project):
    assert project.inside("cat", "/run/secrets/hf_token") == TOKEN
    project.wait(lambda: project.step() > 0, "the first step")
    assert TOKEN not in docker("inspect", project.container()).stdout
    assert TOKEN not in project.logs() + project.logs("preflight")
    for path in ("/status", "/metrics", "/log"):
        assert TOKEN not in str(project.ask(path))
    for path in (project.root / "outputs").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_log_has_no_error_and_a_file_of_its_own(project):
    assert not re.search(r"error|traceback|exception", project.logs(), re.IGNORECASE)


def test_health_check_sh_finds_the_container_healthy(project):
    done = health_check(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "healthy" in done.stdout


def test_docker_finds_the_container_unhealthy_when_its_worker_hangs(project):
    """The last one: it ends the run."""
    project.wait(lambda: project.step() > 0, "the first step")
    worker = project.processes("lora_trainer.train.worker")[0]
    project.inside("bash", "-c", f"kill -STOP {worker}")
    project.wait(lambda: project.state()["Health"]["Status"] == "unhealthy", "unhealthy", 90)
    answer = project.ask("/health")
    assert answer["status"] == "unhealthy"
    assert "no progress" in answer["reason"]
    states = project.inside("bash", "-c", "cat /proc/[0-9]*/stat 2>/dev/null | cut -d' ' -f3")
    assert "Z" not in states.split()
    docker("stop", project.container())
    assert project.state()["ExitCode"] == 70
