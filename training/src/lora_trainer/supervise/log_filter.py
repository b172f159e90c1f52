"""The process between the worker's output and train.log, which redacts secrets.

Library output may contain tokens. It is a separate process, because logging must continue while the
supervisor is stopped or gone and the worker saves and ends. It never blocks the worker: what cannot
be written to disk is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ..redaction import Redaction

LOST = 74  # its exit code where the disk did not take all
SECRETS = "LORA_TRAINER_LOG_SECRETS"
PYTHON = sys.executable
READ_BYTES = 64 * 1024
LONGEST_LINE_BYTES = 1 << 20
PATIENCE_SECONDS = 5.0  # after the worker's end; a child of it may hold its output open


@contextlib.contextmanager
def open_log(
    path: Path, redaction: Redaction, warn: Callable[[str], None] = lambda _: None
) -> Iterator[int]:
    """Yield a descriptor; whatever any process writes to it is appended to the log.

    If the log cannot be written, its content is lost with a warning.
    """
    reading, writing = os.pipe()
    own = str(Path(__file__).resolve().parents[2])
    try:
        with _opened(path, warn) as log:
            process = subprocess.Popen(
                [PYTHON, "-S", "-m", "lora_trainer.supervise.log_filter"],
                stdin=reading,
                stdout=log,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={"PYTHONPATH": own, SECRETS: json.dumps(sorted(redaction.secrets))},
            )
        os.close(reading)
        yield writing
    finally:
        os.close(writing)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.wait(PATIENCE_SECONDS) == LOST:
            warn(f"{path.name} is incomplete: writing to disk failed")


def _opened(path: Path, warn: Callable[[str], None]) -> IO[bytes]:
    try:
        return path.open("ab")
    except OSError as error:
        warn(f"{path.name} is not written: {error.strerror}")
        return Path(os.devnull).open("ab")


def copy(reading: int, writing: int, redaction: Redaction) -> bool:
    """Copy line by line until end of input; return whether everything was written."""
    half, is_whole = b"", True
    while data := os.read(reading, READ_BYTES):
        whole, newline, half = (half + data).rpartition(b"\n")
        is_whole &= _write(writing, redaction.data(whole + newline))
        if len(half) > LONGEST_LINE_BYTES:  # a secret may begin at its end
            half = redaction.data(half)
            edge = len(half) - redaction.longest_bytes
            is_whole &= _write(writing, half[:edge])
            half = half[edge:]
    return _write(writing, redaction.data(half)) and is_whole


def _write(writing: int, data: bytes) -> bool:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(writing, data) :]
    return not data


def main() -> int:
    """Copy standard input to standard output; return the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    return 0 if copy(0, 1, Redaction(json.loads(os.environ[SECRETS]))) else LOST


if __name__ == "__main__":
    sys.exit(main())
