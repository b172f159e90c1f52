"""A process that has imported everything and forks a whole run for each start.

Importing torch, transformers and PEFT costs each worker some 10 s. `Zygote` pays that once. What
is real: the supervisor's and the worker's own `main`, in processes and sessions of their own, their
pipes, locks, files, exit codes and signals. What is not: `exec`. A fork has the imports already, so
nothing here happens while a module is being imported; `test_interrupts.py` and the kills of
`test_resume.py` start the real command for that.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.trainer import SECONDS, SOURCE, WORKER, Run, Trainer

TESTS = Path(__file__).resolve().parents[1]


class Zygote:
    """The test's side: starts runs, and asks how they ended."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._lock = threading.Lock()
        path = f"{SOURCE}{os.pathsep}{TESTS}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.zygote"],
            env=environment | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ask() == "ready"

    def ask(self, **order: Any) -> Any:
        """Give an order, if any; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            if order:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the zygote."""
        self._process.kill()
        self._process.communicate()


class ForkedProcess:
    """A forked supervisor, with as much of Popen as `Run` uses."""

    def __init__(
        self, zygote: Zygote, command: Sequence[str], streams: list[Path], **where: Any
    ) -> None:
        self._zygote = zygote
        self._streams = streams
        self.returncode: int | None = None
        arguments = list(command[command.index("lora_trainer") + 1 :])
        names = [str(one) for one in self._streams]
        self.pid: int = zygote.ask(start=arguments, streams=names, **where)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._zygote.ask(poll=self.pid)
        return self.returncode

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Wait for the end; return what it wrote."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked run", timeout)
            time.sleep(0.01)
        out, err = (one.read_text(errors="replace") for one in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class ForkingTrainer(Trainer):
    """A trainer whose runs are forks."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._zygote = Zygote(self.environment())
        self._starts = 0

    def start(self, output: Path, *options: str, **changed: Any) -> Run:
        """Start training."""
        return self.start_in({}, output, *options, **changed)

    def start_in(self, where: dict[str, Any], output: Path, *options: str, **changed: Any) -> Run:
        """Start training with more `environment`."""
        command = [*self.command(output, **changed), *options]
        self._starts += 1
        streams = [self.root / f"start-{self._starts}.{name}" for name in ("out", "err")]
        process = ForkedProcess(self._zygote, command, streams, **where)
        return Run(command, output, self.environment(), process)

    def close(self) -> None:
        """End the process that forks them."""
        self._zygote.close()


class ForkedWorker:
    """The supervisor's side: a worker, with as much of Popen as `WorkerGroup` uses."""

    def __init__(self, _command: Sequence[str], *, stdout: Any, pass_fds: Any, env: Any, **_: Any):
        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            log = stdout if isinstance(stdout, int) else stdout.fileno()
            _become(reading, log, log, kept=pass_fds, environment=env)
            Path("/proc/self/comm").write_text(WORKER)
            from lora_trainer.train import worker

            _end_with(worker.main)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = _poll(self.pid)
        return self.returncode

    def wait(self) -> int:
        """Wait for the end."""
        while self.poll() is None:
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(stdin: int, out: int, err: int, *, kept: Sequence[int], environment: Any) -> None:
    """Take streams, session, signals and environment as a process has them after `exec`."""
    gc.freeze()  # nothing inherited may close a descriptor that is another file's by then
    os.setsid()
    for number, descriptor in enumerate((stdin, out, err)):
        os.dup2(descriptor, number)
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # that of the folder itself is closed already
                os.close(descriptor)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )


def _end_with(act: Callable[[], int]) -> None:
    code = 70
    try:
        code = act()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _train(order: dict[str, Any], environment: dict[str, str]) -> None:
    streams = [os.open(one, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for one in order["streams"]]
    environment = environment | order.get("environment", {})
    _become(os.open(os.devnull, os.O_RDONLY), *streams, kept=(), environment=environment)
    from lora_trainer import __main__
    from lora_trainer.supervise import workers

    class Subprocess:
        """`subprocess` as `group` uses it."""

        PIPE = subprocess.PIPE
        Popen = ForkedWorker

    workers.subprocess = Subprocess  # type: ignore[assignment]
    sys.argv = ["lora-trainer", *order["start"]]
    _end_with(__main__.main)


def _serve() -> None:
    """Import all that a run imports, then fork one for each order."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from lora_trainer import cli  # noqa: F401
    from lora_trainer.commands import check, merge  # noqa: F401
    from lora_trainer.report import charts  # noqa: F401
    from lora_trainer.supervise import supervisor  # noqa: F401
    from lora_trainer.train import session, worker  # noqa: F401

    environment = dict(os.environ)
    print('"ready"', flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            print(json.dumps(_poll(order["poll"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _train(order, environment)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    _serve()
