"""A Compose project over the real image and the real compose files, with folders of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.tiny_model import write_model, write_rows

TRAINING = Path(__file__).resolve().parents[2]
# A user that is neither root nor the image's: results must belong to whoever called.
UID = 1234
# What the secrets of the image's build hold: it must not be found in the image.
MARK = "canary-of-the-build-secret"
SECONDS = 240.0


def docker(*arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Call the client; both outputs are kept."""
    done = subprocess.run(
        ["docker", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        **options,
    )
    assert not check or done.returncode == 0, f"docker {arguments}: {done.stderr}{done.stdout}"
    return done


def build(tag: str, folder: Path, network: str = "host") -> subprocess.CompletedProcess[str]:
    """Build the cpu stack with build.sh, every secret given from files in a folder."""
    certificates = folder / "certificates.pem"
    own = os.environ.get("LORA_TEST_CA_CERT", "/etc/ssl/certs/ca-certificates.crt")
    certificates.write_text(Path(own).read_text() + f"\n# {MARK}\n")
    pip_conf = folder / "pip.conf"
    pip_conf.write_text(f"# {MARK}\n[global]\ntimeout = 180\n")
    arguments = ["--stack", "cpu", "--tag", tag, "--network", network]
    arguments += ["--ca-cert", str(certificates), "--pip-conf", str(pip_conf)]
    if base := os.environ.get("LORA_TEST_BASE_IMAGE"):
        arguments += ["--base-image", base]
    if wheels := os.environ.get("LORA_TEST_WHEELS"):
        arguments += ["--wheels", wheels]
    return subprocess.run(
        [TRAINING / "build.sh", *arguments],
        env=os.environ | {"BUILDKIT_PROGRESS": "plain"},
        capture_output=True,
        text=True,
        check=False,
    )


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Project:
    """One run: its folders on the host, its settings, its containers."""

    def __init__(self, root: Path, image: str, **settings: Any) -> None:
        self.root = root
        self.name = f"lora-test-{root.name.replace('_', '-').lower()}-{os.getpid()}"
        self.port = free_port()
        for name in ("datasets", "outputs", "models", "logs"):
            (root / name).mkdir(parents=True)
            os.chown(root / name, UID, UID)
        for file in write_model(root / "datasets" / "model").iterdir():
            file.chmod(0o644)  # safetensors makes its files for their owner alone
        write_rows(root / "datasets" / "train.jsonl", 0, 64)
        self.settings: dict[str, Any] = {
            "model_name_or_path": "/workspace/datasets/model",
            "dataset": "train.jsonl",
            "preprocessing_num_workers": 1,
            "max_seq_length": 128,
            "lora_r": 4,
            "lora_dropout": 0.1,
            "per_device_train_batch_size": 2,
            "max_steps": 40,
            "save_steps": 10,
            "learning_rate": 0.01,
            "bf16": False,
            "report_to": [],
            "run_name": "run",
        } | settings
        self.config = root / "config.json"
        self.config.write_text(json.dumps(self.settings))
        self.overrides: list[str] = [str(TRAINING / "docker-compose.cpu.yml")]
        self.environment = {name: value for name, value in os.environ.items() if name != "LORA_UID"}
        self.environment |= {
            "LORA_IMAGE": image,
            "LORA_UID": str(UID),
            "LORA_GID": str(UID),
            "HEALTH_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
            "LORA_CONFIG": str(self.config),
        }
        for name in ("datasets", "outputs", "models", "logs"):
            self.environment[f"LORA_{name.upper()}"] = str(root / name)

    def __enter__(self) -> Project:
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--timeout", "0", "--volumes", check=False)

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Call Compose with the shipped files."""
        files = [TRAINING / "docker-compose.training.yml", *self.overrides]
        flags = [part for file in files for part in ("--file", str(file))]
        return docker(
            *("compose", "--project-name", self.name, *flags, *arguments),
            check=check,
            env=self.environment,
        )

    def up(self) -> int:
        """Start; return 0, or the exit code of the preflight that refused."""
        done = self.compose("up", "--detach", "--no-build", check=False)
        if done.returncode == 0:
            return 0
        state = self.state("preflight")
        assert state["Status"] == "exited", done.stderr
        return int(state["ExitCode"])

    def container(self, service: str = "trainer") -> str:
        """Return the id of a service's container; empty if it was never made."""
        return self.compose("ps", "--all", "--quiet", service).stdout.strip()

    def inspect(self, service: str = "trainer") -> dict[str, Any]:
        """Return all that Docker knows of a container."""
        facts: dict[str, Any] = json.loads(docker("inspect", self.container(service)).stdout)[0]
        return facts

    def state(self, service: str = "trainer") -> dict[str, Any]:
        """Return a container's state."""
        state: dict[str, Any] = self.inspect(service)["State"]
        return state

    def logs(self, service: str = "trainer") -> str:
        """Return what a container printed."""
        done = docker("logs", self.container(service))
        return done.stdout + done.stderr

    def inside(self, *command: str, check: bool = True) -> str:
        """Run a command in the running container as its user."""
        return docker("exec", self.container(), *command, check=check).stdout

    def ask(self, path: str) -> dict[str, Any] | None:
        """Return the server's answer; None if there is none yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as got:
                return dict(json.load(got))
        except urllib.error.HTTPError as refused:
            return dict(json.load(refused))
        except (OSError, ValueError):
            return None

    def step(self) -> int:
        """Return the last step that the server tells of."""
        return int((self.ask("/metrics") or {}).get("current_step") or 0)

    def wait(self, is_so: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        """Wait until something is so, and return it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := is_so():
                return value
            if self.state()["Status"] == "exited" and not is_so():
                break
            time.sleep(0.1)
        raise AssertionError(f"{what} did not happen in {seconds:.0f} s:\n{self.logs()}")

    def wait_for_end(self) -> int:
        """Wait until the container has ended for good; return its exit code."""
        self.wait(lambda: self.state()["Status"] == "exited", "the end")
        return int(self.state()["ExitCode"])

    def processes(self, word: str, *, check: bool = True) -> list[int]:
        """Return the ids, as the container sees them, of processes with a word in their command."""
        script = (
            "import glob, os, sys\nfor name in glob.glob('/proc/[0-9]*/cmdline'):\n"
            "    text = open(name).read().split(chr(0))\n"
            "    pid = name.split('/')[2]\n"
            "    if sys.argv[1] in text and pid != str(os.getpid()): print(pid)"
        )
        printed = self.inside("python3", "-IS", "-c", script, word, check=check)
        return sorted(map(int, printed.split()))

    @property
    def run_folder(self) -> Path:
        """Return the run's results on the host."""
        return self.root / "outputs" / "run"


def call(project: Project, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the project's settings."""
    environment = project.environment | {"COMPOSE_PROJECT_NAME": project.name}
    return subprocess.run(
        [str(TRAINING / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS * 2,
        check=False,
    )


def health_check(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run health-check.sh."""
    return call(project, "health-check.sh", *arguments)
