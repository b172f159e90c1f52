"""The environment that the scripts start the trainer in: made once from the locks of a stack.

`lib/environment.sh` starts this before anything is installed, so only the standard library and
the errors of this package are imported, by any Python from 3.10 on.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

from ..errors import (
    AccessError,
    BusyError,
    ConfigError,
    InternalError,
    StoppedError,
    StorageError,
    TrainerError,
)
from ..host.virtual_environment import VirtualEnvironment, lock, share
from ..units import size
from .pip import Pip, say

TRAINING = Path(__file__).parents[3]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_BYTES, CUDA_BYTES = 3 * 10**9, 10 * 10**9
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Installer:
    """Makes an environment with a Python."""

    def __init__(self, environment: VirtualEnvironment, python: str, caller: str) -> None:
        self.environment, self.python = environment, python
        self.venv = environment.venv
        self.elsewhere = f"LORA_VENV=/another/folder/venv {caller}"

    def install(self, *, has_tests: bool) -> None:
        """Make the environment, unless another start makes it meanwhile; add the tests' packages.

        Raises:
            TrainerError: what hinders it.
        """
        try:
            self.venv.parent.mkdir(parents=True, exist_ok=True)
            file = self.venv.with_name(f"{self.venv.name}.lock").open("a")
        except OSError as error:
            if self.environment.is_ready() and not has_tests:  # it is only for reading
                return
            raise self._unwritable(error) from error
        with file:
            self._lock_alone(file)
            try:
                if not self.environment.is_ready():
                    self._refuse_foreign()
                    self._make()
                lock(file, fcntl.LOCK_SH)
                if has_tests and not self.environment.has_tests():
                    self._add_tests()
            except OSError as error:
                raise self._unwritable(error) from error
        if not self.environment.is_ready():
            raise InternalError.of("the environment is not ready", str(self.venv), "unknown")

    def _lock_alone(self, file: IO[str]) -> None:
        """Return with the lock, alone, or shared once another start has made the environment."""
        while not lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if self.environment.stamp() is not None and not self.environment.is_ready():
                raise BusyError.of(
                    "the environment must be rebuilt, but a run is using it",
                    where=str(self.venv),
                    why="the lock files, the place or the GPU changed since that run started",
                    remedy=f"wait for the run to end, or: {self.elsewhere}",
                )
            if not self.environment.is_ready():
                say(f"Another start is preparing {self.venv}; waiting for it")
            lock(file, fcntl.LOCK_SH)
            if self.environment.is_ready():
                return
            lock(file, fcntl.LOCK_UN)

    def _refuse_foreign(self) -> None:
        """Leave the environment of another checkout as it is."""
        stamp = self.environment.stamp()
        if stamp is None or not self.environment.is_borrowed(stamp):
            return
        raise ConfigError.of(
            "the environment belongs to another checkout",
            where=f"LORA_VENV={self.venv}",
            why=f"{stamp.checkout} made it, and this checkout needs other packages: the locks, the "
            "stack or the Python differ",
            remedy=f"{self.elsewhere}; or, if that one needs it no longer: rm -r {self.venv}",
        )

    def _make(self) -> None:
        stamp = self.environment.packages()
        if stamp is None:
            self._install_stack()
            stack = self.environment.stack
        else:  # made by a checkout that is gone
            stack = stamp.stack
        (self.venv / "stamp").unlink(missing_ok=True)
        self._link()
        digest = self.environment.stack_digest(stack)
        _write(self.venv / "stamp", f"{digest} {stack} {self.environment.checkout}\n")

    def _install_stack(self) -> None:
        began, locks = time.monotonic(), self.environment.locks
        self._check_disk(CPU_BYTES if self.environment.stack == "cpu" else CUDA_BYTES)
        if self.venv.exists() and not (self.venv / "stamp").exists():
            say(f"Found an unfinished {self.venv}; installing it again")
        say(
            f"Installing the stack {self.environment.stack} into {self.venv} "
            "(once; takes some minutes)"
        )
        say(f"  {_run(self.python, '--version').stdout.strip()} from {self.python}")
        for name in ("stamp", "stamp-test"):
            (self.venv / name).unlink(missing_ok=True)
        result = _run(self.python, "-m", "venv", "--clear", self.venv)
        if result.returncode:
            last = ((result.stdout + result.stderr).strip().splitlines() or ["venv failed"])[-1]
            raise self._unwritable(last)
        pip = Pip(self.venv, "install.log")
        pip.install("the locked packages", locks / f"{self.environment.stack}.txt")
        self._install_torch(pip)
        pip.install("the embedded base model and charts", locks / "embedded.txt")
        say(f"  done in {time.monotonic() - began:.0f} s")

    def _install_torch(self, pip: Pip) -> None:
        """Try the user's own sources, then PyTorch's; what those cannot give is much larger."""
        lock_file = self.environment.locks / f"{self.environment.stack}-torch.txt"
        version = re.search(r"^torch==([0-9.]*)", lock_file.read_text(), re.M)
        torch = f"torch {version[1]}" if version else "torch"
        if self.environment.stack == "cpu":
            say(f"  {torch} for the CPU")
            if pip.run("-r", lock_file):
                return
            if "No matching distribution" not in pip.output:
                raise pip.fault("torch")
            if pip.run("--extra-index-url", TORCH_CPU_INDEX, "-r", lock_file):
                return
            say(
                "  torch's CPU build is not reachable; using the registry's build with CUDA: "
                "3 GB to download"
            )
            self._check_disk(CUDA_BYTES)
            self.environment.stack = "current"
            lock_file = self.environment.locks / "current-torch.txt"
        pip.install(f"{torch} with CUDA", lock_file)

    def _add_tests(self) -> None:
        """Add the tests' packages; a run that goes on meanwhile is not disturbed."""
        self._refuse_foreign()
        with self.venv.with_name(f"{self.venv.name}.test.lock").open("a") as file:
            lock(file, fcntl.LOCK_EX)
            if self.environment.has_tests():
                return
            pip = Pip(self.venv, "install-test.log")
            say("Adding the tests' packages")
            for one in self.environment.test_locks:
                pip.install(f"from requirements/{one.name}", one)
            digest = self.environment.digest(*self.environment.test_locks)
            _write(self.venv / "stamp-test", f"{digest}\n")

    def _link(self) -> None:
        """Use the sources where they are, so that an edit or a git pull needs no installation."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        done = _run(self.environment.python, "-I", "-c", code)
        if done.returncode:
            raise self._unwritable(done.stderr.strip())
        path = Path(done.stdout.strip()) / "lora_trainer.pth"
        path.write_text(f"{self.environment.checkout / 'src'}\n")
        command = self.venv / "bin" / "lora-trainer"
        command.write_text(f'#!/bin/sh\nexec "{self.environment.python}" -m lora_trainer "$@"\n')
        command.chmod(0o755)

    def _check_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self.venv.parent).free
        if free < needed:
            raise StorageError.of(
                "too little disk space for the environment",
                where=str(self.venv),
                why=f"{size(free)} are free, {size(needed)} are needed",
                remedy=f"free some space, or: {self.elsewhere}",
            )

    def _unwritable(self, error: OSError | str) -> TrainerError:
        """Return the error of a folder that may not be written, or that cannot be."""
        why = error if isinstance(error, str) else error.strerror or str(error)
        is_refused = isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
        )
        is_refused |= bool(re.search(r"ermission denied|Read-only file|not permitted", why))
        return (AccessError if is_refused else StorageError).of(
            "the environment cannot be written",
            where=str(self.venv),
            why=why,
            remedy=f"make room or give access there, or: {self.elsewhere}",
        )


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _write(path: Path, text: str) -> None:
    """Write a small file in one move."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, then become the command that follows `--`; with --ready only look."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--stack", required=True)
    parser.add_argument("--tests", action="store_true", help="with the tests' packages")
    parser.add_argument("--caller", default="run.sh", help="what remedies name")
    parser.add_argument("--python", default=sys.executable, help="to make the environment with")
    parser.add_argument("--ready", type=int, help="share the lock of this descriptor, if ready")
    parser.add_argument("command", nargs="*")
    given = parser.parse_args(arguments)
    environment = VirtualEnvironment(given.venv, given.stack, TRAINING)
    if given.ready is not None:
        return 0 if share(environment, given.ready, has_tests=given.tests) else 1

    def stop(*_: object) -> NoReturn:
        raise StoppedError.of(
            "stopped while installing",
            where=str(given.venv),
            why="a signal came",
            remedy="start again; the installation is repeated",
        )

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        Installer(environment, given.python, given.caller).install(has_tests=given.tests)
    except TrainerError as error:
        say(error.block())
        return error.exit_code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if given.command:
        os.execv(given.command[0], given.command)  # noqa: S606
    return 0
