"""The pip of an environment that is being made: its log, its progress, and why it failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from ..errors import AccessError, StorageError, TrainerError, UnavailableError

PROGRESS = re.compile(r" *(Collecting|Downloading|Installing) ")
POLL_SECONDS = 0.2


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class Pip:
    """The environment's own pip, which writes to a log; on a terminal its progress is shown."""

    def __init__(self, venv: Path, log: str) -> None:
        self.python, self.venv, self.log = venv / "bin" / "python", venv, venv / log
        self.log.write_text("")
        self.is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.output = ""

    def install(self, what: str, lock_file: Path) -> None:
        """Install a lock, every file checked against its hash.

        Raises:
            TrainerError: why it cannot be.
        """
        say(f"  {what}")
        if not self.run("--require-hashes", "-r", lock_file):
            raise self.fault(what)

    def run(self, *arguments: str | Path) -> bool:
        """Run `pip install`; tell whether it went well, and keep what it printed."""
        options = ("--no-user", "--no-deps", "--no-compile")
        command = (self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install")
        start = self.log.stat().st_size
        with (
            self.log.open("ab") as log,
            subprocess.Popen(
                [*command, *options, *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            ) as process,
        ):
            try:
                while self.is_terminal and process.poll() is None:
                    self._show_progress(start)
                    time.sleep(POLL_SECONDS)
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                if self.is_terminal:
                    sys.stderr.write("\r\x1b[K")
        self.output = self._since(start)
        return code == 0

    def _show_progress(self, start: int) -> None:
        lines = [line for line in self._since(start).splitlines() if PROGRESS.match(line)]
        if lines:
            sys.stderr.write(f"\r\x1b[K    {lines[-1]:.72}")
            sys.stderr.flush()

    def _since(self, start: int) -> str:
        with self.log.open("rb") as log:
            log.seek(start)
            return log.read().decode("utf-8", "replace")

    def fault(self, what: str) -> TrainerError:
        """Return the error of pip's last failure, as far as its output tells the cause."""
        lines = re.findall(r"^ *(?:ERROR|error).*", self.output, re.M)
        why = lines[-1] if lines else ""
        if re.search(r"No space left|Errno 28|quota exceeded", self.output):
            room = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
            return StorageError.of(
                "the disk is full",
                where=str(self.venv),
                why=why or "no space left",
                remedy=f"free some space there and in {room}, then start again",
            )
        if re.search(r"Errno 13|Permission denied|Read-only file system", self.output):
            return AccessError.of(
                "the environment cannot be written",
                where=str(self.venv),
                why=why or "permission denied",
                remedy="LORA_VENV=/a/writable/folder/venv ./training/run.sh",
            )
        if "DO NOT MATCH THE HASHES" in self.output:
            return UnavailableError.of(
                "a package differs from the lock files",
                where=str(self.log),
                why="its sha256 is not the one that was locked: a damaged download, or a changed "
                "package",
                remedy="pip cache purge, then start again; if it stays, do not trust the package "
                "index",
            )
        return UnavailableError.of(
            f"{what} could not be installed",
            where=str(self.log),
            why=why or "pip failed",
            remedy="check the network and pip's settings (pip config list), then start again",
        )
