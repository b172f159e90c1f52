"""A copy of the scripts around a trainer that only prints its arguments, with a fake pip.

The PATH of a `Checkout` holds a few system tools and a `python3` whose venv gets a pip that
writes down its calls and then does what the file `pip-does` says.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

TRAINING = Path(__file__).resolve().parents[2]
TOOLS = (
    "awk bash cat chmod cp date df dirname env grep mkdir mktemp mv rm sed sh sha256sum sleep tail"
    " nice uname wc"
)
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}"

# What runs before anything is installed.
INSTALLS = (
    "__init__.py errors.py units.py commands/__init__.py commands/install.py commands/pip.py"
    " model/stacks.csv host/__init__.py host/quoting.py host/virtual_environment.py"
)
PYTHON = """#!/bin/sh
case "$*" in
  *ensurepip*) echo "11 $0" ;;
  "-m venv"*)
    echo venv >>"{root}/calls"
    "{base}" -m venv --without-pip "$3" "$4" || exit 1
    mv "$4/bin/python" "$4/bin/real-python"
    cp "{root}/venv-python" "$4/bin/python"
    ;;
  *) exec "{base}" "$@" ;;
esac
"""

VENV_PYTHON = """#!/bin/sh
case "$*" in
  "-m pip"*)
    echo "pip $*" >>"{root}/calls"
    [ ! -e "{root}/pip-does" ] || . "{root}/pip-does"
    ;;
  "-m pytest"*) echo "$*" ;;
  *) exec "${{0%/*}}/real-python" "$@" ;;
esac
"""

TRAINER = """import os, sys, time
print("trainer", *sys.argv[1:])
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES", "unset"), flush=True)
time.sleep(float(os.environ.get("TRAINER_SECONDS", 0)))
"""


class Checkout:
    """A checkout with the real scripts and a stub of everything that they start."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.training = root / "training"
        self.venv = self.training / ".venv"
        self.bin = root / "bin"
        (self.training / "requirements").mkdir(parents=True)
        (self.training / "src" / "lora_trainer").mkdir(parents=True)
        (root / ".ci").mkdir()
        self.bin.mkdir()
        for script in (*TRAINING.glob("*.sh"), *TRAINING.glob("docker-compose.*")):
            shutil.copy(script, self.training)
        shutil.copytree(TRAINING / "lib", self.training / "lib")
        for script in (TRAINING.parent / ".ci").iterdir():
            shutil.copy(script, root / ".ci")
        for stack in ("cpu", "current", "cu121"):
            for name in (stack, f"{stack}-torch", f"{stack}-test", "embedded", "deepspeed"):
                (self.training / "requirements" / f"{name}.txt").write_text(f"{name}==1\n")
        self.write_lock_sh(status=0)
        for file in ("requirements/install.sh", "train_lora.py"):
            shutil.copy(TRAINING / file, self.training / file)
        package = self.training / "src" / "lora_trainer"
        for file in INSTALLS.split():
            (package / file).parent.mkdir(exist_ok=True)
            shutil.copy(TRAINING / "src" / "lora_trainer" / file, package / file)
        (self.training / "config.json").write_text("{}")
        (self.training / "src" / "lora_trainer" / "__main__.py").write_text(TRAINER)
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        self.write_tool("python3", PYTHON)
        (root / "venv-python").write_text(VENV_PYTHON.format(root=root))
        (root / "venv-python").chmod(0o755)

    def write_lock_sh(self, status: int) -> None:
        script = self.training / "requirements" / "lock.sh"
        script.write_text(f'#!/bin/sh\necho "locks $*"\nexit {status}\n')
        script.chmod(0o755)

    def write_tool(self, name: str, text: str) -> None:
        tool = self.bin / name
        tool.unlink(missing_ok=True)
        tool.write_text(text.format(root=self.root, base=BASE_PYTHON))
        tool.chmod(0o755)

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.root), **extra}

    def run(self, script: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / script), *arguments],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.training / "run.sh"), *arguments],
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self) -> list[str]:
        """Return the calls of venv and pip; of the latter only the lock file and the index."""
        log = self.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [
            " ".join(re.findall(r"--extra-index-url|[\w-]+\.txt", line)) or line for line in lines
        ]

    def wait_for_calls(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.calls()) < count:
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.02)
