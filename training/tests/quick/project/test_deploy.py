"""What training/deploy starts is what Compose starts: the same user, limits, mounts and secrets."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_trainer.commands.train import refuse_old_torch
from lora_trainer.errors import MEANINGS
from support.checkout import TRAINING

pytestmark = pytest.mark.any_stack
DEPLOY = TRAINING / "deploy"
UNITS = {"g": 1 << 30, "gb": 1 << 30, "G": 1 << 30, "Gi": 1 << 30}
# Set by Compose for what Kubernetes says otherwise: the driver's parts, and names on the host.
OF_DOCKER = re.compile(r"NVIDIA_|LORA_HOST_")
# Kubernetes only: the probes and `kubectl port-forward` come from inside the pod.
OF_KUBERNETES = {"LORA_TRAINER_HEALTH_HOST": "127.0.0.1", "LORA_REQUIRE_GPU": "1"}
NEVER_AGAIN = [65, 77, 78]


def composed() -> dict[str, Any]:
    """Return the trainer's service with every variable at its default."""
    text = (TRAINING / "docker-compose.training.yml").read_text()
    while (plain := re.sub(r"\$\{\w+:-([^${}]*)\}", r"\1", text)) != text:
        text = plain
    service: dict[str, Any] = yaml.safe_load(text)["services"]["trainer"]
    return service


def pods() -> dict[str, Any]:
    job = yaml.safe_load((DEPLOY / "kubernetes" / "job.yaml").read_text())
    runtime = yaml.safe_load((DEPLOY / "kubeflow" / "runtime.yaml").read_text())
    replicated = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    return {
        "kubernetes": job["spec"]["template"]["spec"],
        "kubeflow": replicated["spec"]["template"]["spec"],
    }


def containers() -> list[Any]:
    return [
        pytest.param(container, id=f"{name}-{container['name']}")
        for name, pod in pods().items()
        for container in [*pod.get("initContainers", ()), *pod["containers"]]
    ]


def size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w+)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def sbatch() -> dict[str, str]:
    """Return the options in the script's head."""
    text = (DEPLOY / "slurm" / "train.sbatch").read_text()
    lines = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
    return dict((*line.split("=", 1), "")[:2] for line in lines)


@pytest.mark.parametrize("container", containers())
def test_a_pod_has_the_limits_of_compose(container: dict[str, Any]) -> None:
    limits, service = container["resources"]["limits"], composed()
    assert size(limits["memory"]) == size(service["deploy"]["resources"]["limits"]["memory"])
    assert int(limits["cpu"]) == int(service["cpu_quota"]) / int(service["cpu_period"])
    assert limits["nvidia.com/gpu"] >= 1


@pytest.mark.parametrize("container", containers())
def test_a_pod_is_hardened_as_compose_is(container: dict[str, Any]) -> None:
    context, service = container["securityContext"], composed()
    assert context["readOnlyRootFilesystem"] == service["read_only"] is True
    assert context["capabilities"] == {"drop": service["cap_drop"]}
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert context["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("name", pods())
def test_a_pod_runs_as_the_user_of_compose(name: str) -> None:
    context = pods()[name]["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == composed()["user"]
    assert context["runAsNonRoot"] is True
    assert pods()[name]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("container", containers())
def test_a_pod_has_the_mounts_of_compose(container: dict[str, Any]) -> None:
    service = composed()
    asked = {one["target"]: one.get("read_only", False) for one in service["volumes"]}
    asked |= {"/run/secrets": True, "/tmp": False, "/dev/shm": False}
    mounts = container["volumeMounts"]
    assert {one["mountPath"]: one.get("readOnly", False) for one in mounts} == asked


@pytest.mark.parametrize("name", pods())
def test_a_pod_has_the_secrets_and_memory_folders_of_compose(name: str) -> None:
    volumes = {volume["name"]: volume for volume in pods()[name]["volumes"]}
    service = composed()
    temporary = service["tmpfs"][0].rsplit("size=", 1)[1]
    for volume, asked in (("tmp", temporary), ("shared-memory", service["shm_size"])):
        folder = volumes[volume]["emptyDir"]
        assert (folder["medium"], size(folder["sizeLimit"])) == ("Memory", size(asked))
    created = (DEPLOY / "kubernetes" / "job.yaml").read_text()
    assert set(re.findall(r"--from-(?:file|literal)=(\w+)=", created)) == set(service["secrets"])


@pytest.mark.parametrize("container", containers())
def test_a_pod_has_the_environment_of_compose(container: dict[str, Any]) -> None:
    given = {one["name"]: one["value"] for one in container["env"]}
    fixed = {
        name: str(value)
        for name, value in composed()["environment"].items()
        if value is not None and not OF_DOCKER.match(name)
    }
    assert given == fixed | OF_KUBERNETES


@pytest.mark.parametrize("name", pods())
def test_a_pod_has_as_long_to_stop_as_compose_allows(name: str) -> None:
    grace = composed()["stop_grace_period"]
    assert f"{pods()[name]['terminationGracePeriodSeconds']}s" == grace


@pytest.mark.parametrize("name", pods())
def test_probes_ask_health_as_docker_does(name: str) -> None:
    container, asked = pods()[name]["containers"][0], composed()["healthcheck"]["test"][1:]
    for probe, alive in (("startup", True), ("readiness", False), ("liveness", True)):
        command = container[f"{probe}Probe"]["exec"]["command"]
        words = shlex.split(command[-1].split(" exec ")[-1]) if command[0] == "sh" else command
        assert words == asked + ["--alive"] * alive


def test_every_engine_restarts_a_crash_as_often_as_compose() -> None:
    restarts = int(composed()["restart"].removeprefix("on-failure:"))
    job = yaml.safe_load((DEPLOY / "kubernetes" / "job.yaml").read_text())
    runtime = yaml.safe_load((DEPLOY / "kubeflow" / "runtime.yaml").read_text())
    sky = yaml.safe_load((DEPLOY / "skypilot" / "train.yaml").read_text())
    script = (DEPLOY / "slurm" / "train.sbatch").read_text()
    assert job["spec"]["backoffLimit"] == restarts
    assert runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] == restarts
    assert sky["resources"]["job_recovery"]["max_restarts_on_errors"] == restarts
    assert f"RESTARTS={restarts} " in script
    assert restarts == ray().RESTARTS


def test_no_engine_repeats_an_error_that_a_retry_cannot_fix() -> None:
    assert set(NEVER_AGAIN) < set(MEANINGS)
    for path in (DEPLOY / "kubernetes" / "job.yaml", DEPLOY / "kubeflow" / "runtime.yaml"):
        assert f"values: {NEVER_AGAIN}" in path.read_text()
    script = (DEPLOY / "slurm" / "train.sbatch").read_text()
    assert f"NEVER_AGAIN=' 0 {' '.join(map(str, NEVER_AGAIN))} '" in script
    assert list(ray().NEVER_AGAIN) == NEVER_AGAIN


def test_slurm_and_ray_and_skypilot_ask_for_the_limits_of_compose() -> None:
    service = composed()
    memory = size(service["deploy"]["resources"]["limits"]["memory"])
    cpus = int(service["cpu_quota"]) // int(service["cpu_period"])
    assert (size(sbatch()["mem"]), int(sbatch()["cpus-per-task"])) == (memory, cpus)
    assert (memory, cpus) == (ray().MEMORY_BYTES, ray().CPUS)
    asked = yaml.safe_load((DEPLOY / "skypilot" / "train.yaml").read_text())["resources"]
    assert (asked["cpus"], asked["memory"]) == (f"{cpus}+", f"{memory >> 30}+")


def test_the_image_for_several_nodes_has_a_torch_that_a_launcher_can_start() -> None:
    for container in pods()["kubeflow"]["containers"]:
        stack = container["image"].split(":")[1]
        lock = (TRAINING / "requirements" / f"{stack}-torch.txt").read_text()
        refuse_old_torch(re.search(r"^torch==(\S+)", lock, re.MULTILINE)[1])  # type: ignore[index]


def test_slurm_signals_early_enough_for_a_checkpoint() -> None:
    assert f"{sbatch()['signal'].split('@')[1]}s" == composed()["stop_grace_period"]


@pytest.mark.parametrize(
    "path", ["kubernetes/job.yaml", "kubeflow/trainjob.yaml", "slurm/train.sbatch",
             "skypilot/train.yaml", "ray/train.py"],
)  # fmt: skip
def test_every_file_opens_with_the_three_commands_that_run_it(path: str) -> None:
    head = (DEPLOY / path).read_text().split("\n\n", 6)
    commands = re.findall(
        r"^#?\s+(?:kubectl|sbatch|squeue|scancel|sky|ray) ", "\n\n".join(head), re.MULTILINE
    )
    assert len(commands) >= 3


def ray() -> Any:
    """Import the script; it imports Ray only when it starts."""
    path: Path = DEPLOY / "ray" / "train.py"
    spec = importlib.util.spec_from_file_location("ray_train", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module
