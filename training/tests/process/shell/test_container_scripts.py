"""The container's scripts against a fake docker: what no engine here can show."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from support.checkout import TRAINING, Checkout

pytestmark = pytest.mark.any_stack

# Answers from files of the checkout's root; writes down what it is asked to do.
DOCKER = """#!/bin/sh
facts() {{
  printf '{{"id": "0123456789abcdef", "service": "%s", "restarts": 0, ' "$1"
  printf '"state": {{"Status": "%s", "ExitCode": %s, ' "$3" "$2"
  printf '"OOMKilled": %s, ' "$(cat "{root}/oom")"
  printf '"Error": "%s"}}}}\\n' "$(cat "{root}/start-error" 2>/dev/null)"
}}
echo "docker $*" >>"{root}/docker-calls"
case "$*" in
  "version"*) cat "{root}/engine" 2>/dev/null || {{ cat "{root}/engine-error" >&2; exit 1; }} ;;
  "compose version --short") cat "{root}/compose-version" ;;
  "compose version") ;;
  "buildx version") echo "github.com/docker/buildx v0.13.1 x" ;;
  "info --format {{{{.DockerRootDir}}}}") echo "{root}" ;;
  "info --format {{{{.NCPU}}}}") echo 2 ;;
  "info "*) cat "{root}/runtimes" ;;
  "image inspect --format"*) echo 1760000000 ;;
  "image inspect"*) [ -e "{root}/has-image" ] ;;
  "ps "*preflight*) cat "{root}/preflight" 2>/dev/null ;;
  "ps "*trainer*) cat "{root}/container" 2>/dev/null ;;
  *" up "* | *" run "*)
    cat "${{HF_TOKEN_FILE:-/dev/null}}" >"{root}/token-seen"
    env | grep -E '^(LORA_|HF_|WANDB)' | sort >"{root}/up-environment" ;;
  "run --rm --interactive"* | "exec --interactive"*)
    while [ "$1" != health ]; do
      [ "$1" != --env ] || export "$2"
      shift
    done
    PYTHONPATH=@SOURCE exec @PYTHON -m lora_trainer "$@" ;;
  "logs "*) cat "{root}/log" >&2 ;;
  "inspect --format {{{{.State.Status}}}}"*preflight*) echo exited ;;
  "inspect --format {{{{.State.Status}}}}"*) cat "{root}/state" ;;
  "inspect --format {{{{.State.OOMKilled}}}}"*) cat "{root}/oom" ;;
  "inspect --format {{{{.State.Error}}}}"*) cat "{root}/start-error" 2>/dev/null ;;
  "inspect --format {{{{.State.Running}}}}"*) echo true ;;
  "inspect --format {{{{.State.ExitCode}}}}"*) cat "{root}/exit-code" ;;
  "inspect --format {{{{.Image}}}}"*) echo sha256:1 ;;
  "inspect --format"*preflight*)
    facts preflight "$(cat "{root}/exit-code")" exited ;;
  "inspect --format"*) facts trainer "$(cat "{root}/exit-code")" "$(cat "{root}/state")" ;;
esac
"""
TOOLS = (
    "cut",
    "git",
    "head",
    "id",
    "mapfile",
    "ls",
    "stat",
    "tr",
    "sort",
    "chown",
    "setsid",
    "touch",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path)
    for tool in TOOLS:
        if path := shutil.which(tool):
            (checkout.bin / tool).symlink_to(path)
    shutil.copy(TRAINING / "Dockerfile", checkout.training)
    shutil.copy(TRAINING / ".dockerignore", checkout.training)
    (tmp_path / "public" / "datasets").mkdir(parents=True)
    docker = DOCKER.replace("@PYTHON", sys.executable).replace("@SOURCE", str(TRAINING / "src"))
    checkout.write_tool("docker", docker)
    for name, text in {
        "engine": "26.1.5",
        "engine-error": "Cannot connect to the Docker daemon",
        "compose-version": "2.26.1",
        "runtimes": "runc",
        "exit-code": "0",
        "has-image": "",
        "state": "exited",
        "oom": "false",
        "log": "",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    return checkout


def calls(checkout: Checkout) -> str:
    log = checkout.root / "docker-calls"
    return log.read_text() if log.exists() else ""


def with_gpu(checkout: Checkout, line: str) -> None:
    checkout.write_tool("nvidia-smi", f"#!/bin/sh\necho '{line}'\n")


@pytest.mark.parametrize(
    ("gpu", "stack"),
    [
        ("580.65.06, 9.0", "current"),
        ("535.104.05, 8.6", "cu121"),
        ("525.60.13, 7.0", "cu121"),
        ("470.82.01, 8.6", "cpu"),
        ("580.65.06, 7.0", "cu121"),
        ("570.10.01, 12.0", "cpu"),
        ("", "cpu"),
    ],
)
def test_build_picks_the_stack_by_gpu_and_driver(checkout: Checkout, gpu: str, stack: str) -> None:
    with_gpu(checkout, gpu)
    checkout.write_tool("df", "#!/bin/sh\necho title; echo disk 9 9 99000000 9 /\n")
    result = checkout.run("training/build.sh")
    assert result.returncode == 0, result.stderr
    assert f"--build-arg STACK={stack} " in calls(checkout)
    assert f"--tag lora-trainer:{stack} " in calls(checkout)
    assert "1.76 GB" in result.stderr


@pytest.mark.parametrize(("stack", "extra"), [("current", "deepspeed"), ("cu121", "s3fs")])
def test_build_takes_an_extra_of_the_stacks_that_have_it(
    checkout: Checkout, stack: str, extra: str
) -> None:
    checkout.write_tool("df", "#!/bin/sh\necho title; echo disk 9 9 99000000 9 /\n")
    result = checkout.run("training/build.sh", "--stack", stack, "--extra", extra)
    assert result.returncode == 0, result.stderr
    assert f"--build-arg EXTRA={extra} " in calls(checkout)


@pytest.mark.parametrize(
    ("stack", "extra", "message"),
    [("cu121", "deepspeed", "has no DeepSpeed"), ("cpu", "flash", "unknown extra")],
)
def test_build_refuses_an_extra_that_is_not_there(
    checkout: Checkout, stack: str, extra: str, message: str
) -> None:
    result = checkout.run("training/build.sh", "--stack", stack, "--extra", extra)
    assert result.returncode == 78
    assert message in result.stderr
    assert "buildx build" not in calls(checkout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tag",), "--tag needs a value"),
        (("--nonsense",), "unknown argument"),
        (("--ca-cert=absent.pem",), "there is no such file or folder"),
        (("--wheels", "training/config.json"), "--wheels takes a folder"),
    ],
)
def test_build_refuses_wrong_usage_with_78(
    checkout: Checkout, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.root)
    result = checkout.run("training/build.sh", *arguments)
    assert result.returncode == 78
    assert message in result.stderr
    assert calls(checkout) == ""


def test_build_refuses_a_full_disk_with_74(checkout: Checkout) -> None:
    checkout.write_tool("df", "#!/bin/sh\necho title; echo disk 9 9 5000000 9 /\n")
    result = checkout.run("training/build.sh", "--stack", "cpu")
    assert result.returncode == 74
    assert "buildx build" not in calls(checkout)


def test_build_secrets_and_wheels_are_passed_as_such(checkout: Checkout) -> None:
    certificate = checkout.root / "ca.pem"
    certificate.write_text("x")
    checkout.write_tool("df", "#!/bin/sh\necho title; echo disk 9 9 99000000 9 /\n")
    arguments = ("--ca-cert", str(certificate), "--wheels", str(checkout.root), "--no-cache")
    result = checkout.run("training/build.sh", "--stack=cpu", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"--secret id=ca_cert,src={certificate}" in calls(checkout)
    assert f"--build-context wheels={checkout.root}" in calls(checkout)
    assert "--no-cache" in calls(checkout)


@pytest.mark.parametrize(
    ("file", "text", "code", "message"),
    [
        ("engine", "19.03.15", 69, "the Docker engine is too old"),
        ("compose-version", "2.17.3", 69, "Docker Compose is too old"),
    ],
)
def test_old_versions_are_refused_by_name(
    checkout: Checkout, file: str, text: str, code: int, message: str
) -> None:
    (checkout.root / file).write_text(text + "\n")
    for script in (("training/build.sh",), ("training/run.sh", "--docker")):
        result = checkout.run(*script)
        assert result.returncode == code
        assert message in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("permission denied while trying to connect", 77),
        ("Cannot connect to the Docker daemon", 69),
    ],
)
def test_docker_insists_on_an_engine(checkout: Checkout, error: str, code: int) -> None:
    (checkout.root / "engine").unlink()
    (checkout.root / "engine-error").write_text(error + "\n")
    result = checkout.run("training/run.sh", "--docker")
    assert result.returncode == code
    assert error in result.stderr


def test_without_an_engine_the_run_is_local(checkout: Checkout) -> None:
    (checkout.root / "engine").unlink()
    result = checkout.run("training/run.sh")
    assert result.stdout.startswith("trainer train")


def test_an_engine_that_answers_gets_the_run_as_the_caller(checkout: Checkout) -> None:
    (checkout.root / "container").write_text("")
    variables = {"HF_TOKEN": "s3", "LORA_TRAINER_RUN_NAME": 'a "$name"'}
    result = checkout.run(
        "training/run.sh", "--background", "--learning_rate", "1e-4 $x", **variables
    )
    assert result.returncode == 0, result.stderr
    assert "docker-compose.cpu.yml" in calls(checkout)
    override = (checkout.training / ".cache" / "lora-trainer.compose.yml").read_text()
    assert 'command: ["train", "--learning_rate", "1e-4 $$x"]' in override
    seen = dict(
        line.split("=", 1) for line in (checkout.root / "up-environment").read_text().splitlines()
    )
    assert "      - LORA_TRAINER_RUN_NAME\n" in override
    assert seen["LORA_TRAINER_RUN_NAME"] == 'a "$name"'
    assert seen["LORA_UID"] == (str(os.getuid()) if os.getuid() else "1000")
    assert seen["HF_TOKEN"] == ""
    assert (checkout.root / "token-seen").read_text() == "s3\n"
    assert "s3" not in calls(checkout) + override + result.stderr


@pytest.mark.parametrize("flags", [(), ("--background",), ("--check",)], ids="-".join)
def test_the_tokens_file_is_removed_when_the_run_ends(
    checkout: Checkout, flags: tuple[str, ...]
) -> None:
    (checkout.root / "container").write_text("")
    result = checkout.run("training/run.sh", *flags, HF_TOKEN="s3")
    assert (checkout.root / "token-seen").read_text() == "s3\n", result.stderr
    until = time.monotonic() + 20
    while held := list((checkout.training / ".cache").rglob("HF_TOKEN")):
        assert time.monotonic() < until, held
        time.sleep(0.05)


def test_the_tokens_file_stays_while_the_container_runs(checkout: Checkout) -> None:
    (checkout.root / "container").write_text("0123456789abcdef\n")
    (checkout.root / "state").write_text("running\n")
    result = checkout.run("training/run.sh", HF_TOKEN="s3")
    assert result.returncode == 75
    assert list((checkout.training / ".cache").rglob("HF_TOKEN"))
    result = checkout.run("training/run.sh", "stop")
    assert "docker update --restart no 0123456789abcdef" in calls(checkout)


def test_cpus_are_whole(checkout: Checkout) -> None:
    result = checkout.run("training/run.sh", "--docker", LORA_CPUS="1.5")
    assert result.returncode == 78
    assert "a whole number" in result.stderr


def test_a_gpu_needs_the_toolkit_and_a_list_becomes_device_ids(checkout: Checkout) -> None:
    with_gpu(checkout, "535.104.05, 8.6")
    refused = checkout.run("training/run.sh", "--docker", "--background")
    assert refused.returncode == 69
    assert "nvidia-ctk" in refused.stderr
    (checkout.root / "runtimes").write_text("nvidia runc\n")
    (checkout.root / "container").write_text("")
    result = checkout.run("training/run.sh", "--docker", "--background", "--gpus", "0,2")
    assert result.returncode == 0, result.stderr
    override = (checkout.training / ".cache" / "lora-trainer.compose.yml").read_text()
    preflight, trainer = override.split("  trainer:")
    assert "device_ids" not in preflight
    assert 'device_ids: ["0", "2"]' in trainer
    assert "- CUDA_VISIBLE_DEVICES=0,1\n" in trainer
    assert "docker-compose.cpu.yml" not in calls(checkout).splitlines()[-1]


def test_a_run_under_way_is_not_replaced(checkout: Checkout) -> None:
    (checkout.root / "container").write_text("0123456789abcdef\n")
    result = checkout.run("training/run.sh", "--docker")
    assert result.returncode == 75
    assert " up " not in calls(checkout)


BLOCK = """step 3
error: something in between

the model is not there
  where:  model_name_or_path
  why:    no such folder
  remedy: correct the path
exit code 69 (model, hub or device unavailable)
"""


def ended(checkout: Checkout, code: int, log: str = "", oom: str = "false") -> None:
    """Make the container one that has ended."""
    for name, text in {"container": "0123456789abcdef", "exit-code": str(code), "oom": oom}.items():
        (checkout.root / name).write_text(text + "\n")
    (checkout.root / "log").write_text(log)


@pytest.mark.parametrize(
    ("code", "outcome", "text"),
    [(0, "finished", "healthy: the run has finished"), (143, "stopped", "run.sh resumes it")],
)
@pytest.mark.parametrize("script", [("health-check.sh",), ("run.sh", "status")], ids="-".join)
def test_a_run_that_has_finished_or_was_stopped_is_healthy(
    checkout: Checkout, code: int, outcome: str, text: str, script: tuple[str, ...]
) -> None:
    ended(checkout, code, oom="true")  # of a worker that was restarted
    result = checkout.run(f"training/{script[0]}", *script[1:])
    assert result.returncode == 0, result.stderr
    assert text in result.stdout
    report = json.loads(checkout.run("training/health-check.sh", "--json").stdout)
    assert report["is_healthy"]
    assert (report["outcome"], report["exit_code"]) == (outcome, code)


@pytest.mark.parametrize(
    ("code", "log", "oom", "what", "remedy"),
    [
        (
            69,
            BLOCK,
            "false",
            "the model is not there (exit code 69: model, hub",
            "correct the path",
        ),
        (77, "", "false", "the run ended (exit code 77: no permission)", "run.sh logs"),
        (137, "step 3\n", "false", "killed from outside", "run.sh resumes"),
        (137, "step 3\n", "true", "the kernel killed a process for memory", "raise LORA_MEMORY"),
    ],
)
def test_health_check_names_why_a_container_ended(
    checkout: Checkout, code: int, log: str, oom: str, what: str, remedy: str
) -> None:
    ended(checkout, code, log, oom)
    result = checkout.run("training/health-check.sh", "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert (report["is_healthy"], report["outcome"]) == (False, "failed")
    (problem,) = report["problems"]
    assert what in problem["what"]
    assert remedy in problem["remedy"]


def test_health_check_reports_what_preflight_refused(checkout: Checkout) -> None:
    ended(checkout, 69, BLOCK)
    (checkout.root / "state").write_text("created\n")
    (checkout.root / "preflight").write_text("the-preflight-container\n")
    result = checkout.run("training/health-check.sh")
    assert result.returncode == 1
    assert "the model is not there (exit code 69" in result.stdout


def test_health_check_reports_why_the_engine_could_not_start_the_container(
    checkout: Checkout,
) -> None:
    ended(checkout, 0)
    (checkout.root / "state").write_text("created\n")
    (checkout.root / "start-error").write_text("could not select device driver\n")
    result = checkout.run("training/health-check.sh")
    assert result.returncode == 1
    assert "could not select device driver" in result.stdout


@pytest.mark.parametrize(("name", "code"), [("DONE", 0), ("other", 1)])
def test_health_check_looks_at_a_run_of_this_machine_that_has_ended(
    checkout: Checkout, name: str, code: int
) -> None:
    folder = checkout.root / "public" / "outputs" / "run"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text('{"event": "ended", "exit_code": 78}\n')
    (folder / name).write_text("")
    # Its number is another process's now.
    (folder / "server.json").write_text(f'{{"url": "http://127.0.0.1:9", "pid": {os.getpid()}}}')
    venv = str(Path(sys.executable).parents[1])
    result = checkout.run("training/health-check.sh", LORA_VENV=venv)
    assert result.returncode == code, result.stdout + result.stderr
    assert ("finished" in result.stdout) == (code == 0)
    assert ("configuration" in result.stdout) == (code == 1)
