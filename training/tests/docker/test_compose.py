"""Every combination of the compose files is valid, and each file changes what it is for."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from support.composed import TRAINING, docker

pytestmark = [pytest.mark.timeout(1800)]
CPU, AIRGAPPED = "docker-compose.cpu.yml", "docker-compose.airgapped.yml"


def resolved(*overrides: str, **settings_of_shell: str) -> dict[str, Any]:
    """Return the services as Compose understands the files, which it does silently."""
    files = [TRAINING / name for name in ("docker-compose.training.yml", *overrides)]
    flags = [part for file in files for part in ("--file", str(file))]
    settings = ["--env-file", str(TRAINING / ".env.training")]
    kept = {
        name: os.environ[name]
        for name in ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG")
        if name in os.environ
    } | settings_of_shell
    done = docker("compose", *flags, *settings, "config", "--format", "json", env=kept)
    assert done.stderr == ""
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize("overrides", [(), (CPU,), (AIRGAPPED,), (CPU, AIRGAPPED)], ids="+".join)
def test_every_combination_of_the_files_is_valid(engine: None, overrides: tuple[str, ...]) -> None:
    services = resolved(*overrides)
    service = services["trainer"]
    has_gpu = "devices" in service["deploy"]["resources"].get("reservations", {})
    assert has_gpu == (CPU not in overrides)
    # Preflight starts where Docker has no GPU to give, and knows whether the trainer wants one.
    assert "reservations" not in services["preflight"]["deploy"]["resources"]
    assert services["preflight"]["environment"]["LORA_GPU_RESERVED"] == str(int(has_gpu))
    assert (service.get("network_mode") == "none") == (AIRGAPPED in overrides)
    if AIRGAPPED not in overrides:
        assert [port["host_ip"] for port in service["ports"]] == ["127.0.0.1"]
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"] == "17179869184"
    assert int(service["cpu_quota"]) / int(service["cpu_period"]) == 4


def test_nvidia_visible_devices_decides_what_docker_gives(engine: None) -> None:
    services = resolved(NVIDIA_VISIBLE_DEVICES="0,2", CUDA_VISIBLE_DEVICES="1")
    reserved = services["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["device_ids"] for device in reserved] == [["0,2"]]
    assert services["trainer"]["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
