"""An environment of installed packages: what it was made from, whose it is, who uses it.

It is ready when its stamp names the locks, the Python and the folder that it was made from and in,
and a checkout. The stamp is removed first and written last, so an interrupted installation is
noticed and repeated. Whoever installs holds VENV.lock alone; whoever runs shares it until the
process ends. A second checkout uses the packages with its own sources, and changes nothing: the
environment belongs to the first one while that exists.

Imports nothing of the package, and the standard library alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Stamp:
    """What an environment says of itself: a hash of what it was made from, its stack, its owner."""

    digest: str
    stack: str
    checkout: Path


class VirtualEnvironment:
    """The environment in a folder, for a stack and a checkout."""

    def __init__(self, venv: Path, stack: str, checkout: Path) -> None:
        self.venv, self.stack, self.checkout = venv, stack, checkout
        self.locks = checkout / "requirements"
        self.python = venv / "bin" / "python"

    @property
    def test_locks(self) -> list[Path]:
        """Return the locks of the tests' own packages, which replace none of the trainer's."""
        names = ("cu121-test",) if self.stack == "cu121" else ("cpu-test", "deepspeed", "s3fs-test")
        return [self.locks / f"{name}.txt" for name in names]

    def stack_digest(self, stack: str) -> str:
        """Return the digest of a stack's locks; current and cpu have all but torch in common."""
        rest = "cpu" if stack == "current" else stack
        return self.digest(*(self.locks / f"{n}.txt" for n in (rest, f"{stack}-torch", "embedded")))

    def digest(self, *locks: Path) -> str:
        """Return a hash of the Python, the folder and the locks; empty if one is missing."""
        code = "import sys; sys.stdout.write(sys.version)"
        try:
            version = subprocess.run(
                [self.python, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
            ).stdout
            hashes = [hashlib.sha256(lock_file.read_bytes()).digest() for lock_file in locks]
        except (OSError, subprocess.SubprocessError):
            return ""
        total = hashlib.sha256(repr((version, str(self.venv))).encode())
        for one in hashes:
            total.update(one)
        return total.hexdigest()

    def stamp(self) -> Stamp | None:
        """Return the stamp; None if there is none, as while it is being made."""
        try:
            digest, stack, checkout = (self.venv / "stamp").read_text().strip().split(" ", 2)
        except (OSError, ValueError):
            return None
        return Stamp(digest, stack, Path(checkout))

    def packages(self) -> Stamp | None:
        """Return the stamp if the packages are the stack's, whoever the environment belongs to.

        The CUDA build serves a CPU too; a CPU build is replaced once there is a GPU.
        """
        stamp = self.stamp()
        if stamp is None or (stamp.stack, self.stack) not in (
            (self.stack, self.stack),
            ("current", "cpu"),
        ):
            return None
        return stamp if stamp.digest and stamp.digest == self.stack_digest(stamp.stack) else None

    def is_borrowed(self, stamp: Stamp) -> bool:
        """Return whether the environment belongs to another checkout, which still exists."""
        is_other = self.checkout not in (stamp.checkout, self.venv.parent)
        return is_other and (stamp.checkout / "src").is_dir()

    def is_ready(self) -> bool:
        """Return whether the trainer can be started as it is."""
        stamp = self.packages()
        return stamp is not None and (stamp.checkout == self.checkout or self.is_borrowed(stamp))

    def has_tests(self) -> bool:
        """Return whether the tests' packages are there."""
        with contextlib.suppress(OSError):
            return (self.venv / "stamp-test").read_text().strip() == self.digest(*self.test_locks)
        return False


def lock(file: IO[str] | int, operation: int) -> bool:
    """Lock a file; False if another process holds it. A file system without locks does without."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def share(environment: VirtualEnvironment, descriptor: int, *, has_tests: bool) -> bool:
    """Share the lock of a ready environment; tell whether it is ready."""
    if lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB):
        if environment.is_ready() and (not has_tests or environment.has_tests()):
            return True
        lock(descriptor, fcntl.LOCK_UN)
    return False
