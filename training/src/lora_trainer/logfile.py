"""The process between the worker's output and train.log: strikes secrets out.

Libraries print what they like, tokens among it. A process of its own, because the log must
go on while the supervisor is stopped or gone and the worker saves and ends. It never holds
the worker up: what the disk does not take is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .redaction import Redaction

SECRETS = "LORA_TRAINER_LOG_SECRETS"
PYTHON = sys.executable
READ_BYTES = 64 * 1024
LONGEST_LINE_BYTES = 1 << 20
PATIENCE_SECONDS = 5.0  # after the worker's end; a child of it may hold its output open


@contextlib.contextmanager
def open_log(path: Path, redaction: Redaction) -> Iterator[int]:
    """Give a descriptor; what is written to it, by any process, is appended to the log."""
    reading, writing = os.pipe()
    own = str(Path(__file__).resolve().parents[1])
    try:
        with path.open("ab") as log:
            process = subprocess.Popen(
                [PYTHON, "-S", "-m", "lora_trainer.logfile"],
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
        process.wait(PATIENCE_SECONDS)


def copy(reading: int, writing: int, redaction: Redaction) -> None:
    """Copy line by line until nobody writes any more."""
    half = b""
    while data := os.read(reading, READ_BYTES):
        whole, newline, half = (half + data).rpartition(b"\n")
        _write(writing, redaction.data(whole + newline))
        if len(half) > LONGEST_LINE_BYTES:  # a secret may begin at its end
            half = redaction.data(half)
            edge = len(half) - redaction.longest_bytes
            _write(writing, half[:edge])
            half = half[edge:]
    _write(writing, redaction.data(half))


def _write(writing: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(writing, data) :]


def main() -> None:
    """Copy standard input to standard output."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    copy(0, 1, Redaction(json.loads(os.environ[SECRETS])))


if __name__ == "__main__":
    main()
