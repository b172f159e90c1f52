"""Starts, watches, restarts and stops the worker; owns the lock, events.jsonl and the exit code.

Imports no torch: it must speak from the first moment and outlive every fault of the
worker. Signals reach it alone; it passes them on once, and the worker, in a session of
its own, ends at the next step boundary with a saved checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import psutil

from .errors import (
    ERRORS_BY_CODE,
    BusyError,
    ConfigError,
    InternalError,
    MemoryKilledError,
    Problem,
    StoppedError,
    TrainerError,
    UnavailableError,
)
from .events import (
    Ended,
    Event,
    Failed,
    Restarted,
    RunStarted,
    Stopped,
    Warned,
    parse_line,
)
from .live import LiveRun
from .output import (
    DIGEST,
    DONE,
    EVENTS,
    LOCK,
    LOG,
    RESOLVED,
    SERVER,
    EventFile,
    archive,
    changes,
    make_folder,
    open_lock,
    output_folder,
    read_digest,
    write_json,
    write_text,
)
from .report import write_report
from .server import LogTail, StatusServer, read_token
from .sources import Settings
from .status import RunStatus
from .worker import EVENTS_FD

WORKER_DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    # A thread that waits for the others spins, on a shared core for as long as these
    # need it: a step took 80 s instead of 2 (docs/decisions/0006-threads-that-wait.md).
    "GOMP_SPINCOUNT": "1000",
}
# These exit codes mean the same again on a second try.
FINAL_CODES = frozenset({0, 65, 69, 74, 75, 77, 78, 137, 143})
# How long a start waits for the worker of a supervisor that was killed alone.
ORPHAN_SECONDS = 120.0


class Supervisor:
    """One run, from lock to exit code. `show` is told every event with the status after it.

    `note` is told what is worth a line but is no event.
    """

    def __init__(
        self,
        settings: Settings,
        show: Any,
        *,
        note: Callable[[str], None] = lambda _: None,
        is_debug: bool = False,
    ) -> None:
        self.settings = settings
        self.show = show
        self.note = note
        self.is_debug = is_debug
        self.config = settings.config
        self.output_dir = output_folder(settings)
        self.run_name = self.config.output.run_name or self.output_dir.name
        monitoring = self.config.monitoring
        self.live = LiveRun(stall_timeout_seconds=monitoring.stall_timeout_seconds)
        self._events: EventFile | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock_file: IO[str] | None = None
        self._moved_to: Path | None = None
        self._signals = 0

    @property
    def status(self) -> RunStatus:
        """Return all that is known of the run."""
        return self.live.status

    def run(self, check: Callable[[Settings], None] = lambda _: None) -> int:
        """Do the whole run, `check` first; return 0.

        Raises:
            TrainerError: with the exit code of whatever ended it otherwise.
        """
        with self._serving() as server:
            self.live.detail = "checking the configuration"
            check(self.settings)
            make_folder(self.output_dir)
            with self._lock(), self._forwarding():
                if not self._make_room():
                    return 0
                write_json(self.output_dir / RESOLVED, self.settings.redacted())
                write_text(self.output_dir / DIGEST, self.config.digest() + "\n")
                return self._run_served(server)

    def _run_served(self, server: StatusServer) -> int:
        place = self.output_dir / SERVER
        write_json(place, {"url": server.url, "pid": os.getpid()})
        try:
            self.live.replay(self.output_dir / EVENTS)
            self.live.detail = ""
            with EventFile(self.output_dir / EVENTS) as self._events:
                try:
                    return self._run_worker()
                finally:
                    self._report()
        finally:
            self._linger()
            with contextlib.suppress(OSError):
                place.unlink()

    def tell(self, event: Event) -> None:
        """Record an event, take it up, show it."""
        assert self._events is not None
        self._events.append(event)
        self.show(event, self.live.add(event))

    @contextlib.contextmanager
    def _serving(self) -> Iterator[StatusServer]:
        """Answer over HTTP, from before the first check until the end."""
        monitoring = self.config.monitoring
        server = StatusServer(
            self.live,
            host=monitoring.health_host,
            port=monitoring.health_port,
            token=read_token(monitoring.health_token_file),
            allowed_hosts=monitoring.health_allowed_hosts,
            folder=self.output_dir,
            log=LogTail(self.live, self.output_dir / LOG),
        )
        try:
            server.start()
        except UnavailableError:
            make_folder(self.output_dir)
            with self._lock():  # a run of this very folder says more than its port
                raise
        self.note(f"status: {server.url}")
        try:
            yield server
        finally:
            server.stop()

    def _linger(self) -> None:
        """Go on answering after the end for as long as asked, or until a signal comes."""
        until = time.monotonic() + self.config.monitoring.health_linger_seconds
        while time.monotonic() < until and not self._signals:
            time.sleep(0.1)

    def _run_worker(self) -> int:
        """Start the worker until it finishes, fails for good, or uses up its restarts."""
        attempt, step_before = 0, -1
        while True:
            self.tell(
                RunStarted(
                    run_name=self.run_name,
                    config_digest=self.config.digest(),
                    output_dir=str(self.output_dir),
                    attempt=attempt,
                    pid=os.getpid(),
                )
            )
            for warning in self._warnings() if attempt == 0 else ():
                self.tell(Warned(message=warning))
            code, failure = self._run_once()
            if code == 0:
                write_text(self.output_dir / DONE, f"{time.time():.0f}\n")
                self.tell(Ended(exit_code=0))
                return 0
            if code in FINAL_CODES or self._signals:
                raise self._final(143 if self._signals else code, failure)
            # A worker that dies twice at the same step will die there a third time.
            is_stuck = attempt > 0 and self.status.step == step_before
            if attempt >= self.config.monitoring.max_restarts or is_stuck or code == 70:
                raise self._final(137 if code == -signal.SIGKILL else 70, failure, code)
            step_before, attempt = self.status.step, attempt + 1
            self.tell(Restarted(attempt=attempt, cause=cause_of(code), exit_code=code))

    def _run_once(self) -> tuple[int, Failed | None]:
        """Run one worker to its end; return its exit code and what it said of its failure.

        The worker inherits the lock: should this process be killed alone, no other run
        begins before the worker has noticed, saved and ended.
        """
        assert self._lock_file is not None
        reading, writing = os.pipe()
        order = {
            "config": self.config.model_dump(mode="json"),
            "output_dir": str(self.output_dir),
            "run_name": self.run_name,
            "redacted": self.settings.redacted(),
        }
        failure: Failed | None = None
        with (self.output_dir / LOG).open("ab") as log, os.fdopen(reading) as events:
            with contextlib.suppress(BrokenPipeError):
                self._worker = subprocess.Popen(
                    [sys.executable, "-m", "lora_trainer.worker"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writing, self._lock_file.fileno()),
                    start_new_session=True,
                    env=WORKER_DEFAULTS | os.environ | {EVENTS_FD: str(writing)} | _python_path(),
                )
                os.close(writing)
                if self._signals:  # one that came before there was a worker to pass it to
                    self._worker.send_signal(signal.SIGTERM)
                assert self._worker.stdin is not None
                with self._worker.stdin as stdin:
                    stdin.write(json.dumps(order).encode())
            for line in events:
                event = parse_line(line)
                if event is not None:
                    self.tell(event)
                if isinstance(event, Failed):
                    failure = event
        assert self._worker is not None
        code = self._worker.wait()
        # Once it has said why it gives up, a second fault while it ends changes nothing.
        return (failure.exit_code if failure else code), failure

    def _final(
        self, code: int, failure: Failed | None, worker_code: int | None = None
    ) -> TrainerError:
        """Return the error that ends the run, and say it as the last events."""
        if failure is not None:
            error: TrainerError = ERRORS_BY_CODE[failure.exit_code](
                Problem(**problem) for problem in failure.problems
            )
        elif code == 143:
            saved = any((self.output_dir / "checkpoints").glob("step-*"))
            error = StoppedError.of(
                f"stopped at step {self.status.step}" if self.status.step else "stopped",
                where=str(self.output_dir),
                why="a signal asked for it; what was learnt is in the checkpoint"
                if saved
                else "a signal asked for it before anything was learnt",
                remedy="start the same command again: it resumes by itself",
            )
            if self.status.phase != "stopped":
                self.tell(Stopped(step=self.status.step, signal="SIGTERM"))
        else:
            kind = MemoryKilledError if code == 137 else InternalError
            error = kind.of(
                f"the worker {cause_of(code if worker_code is None else worker_code)}",
                where=f"step {self.status.step}",
                why=f"restarting did not help ({self.config.monitoring.max_restarts} allowed)",
                remedy=f"see {self.output_dir / LOG}; lower per_device_train_batch_size or "
                "max_seq_length if memory is short; start again to resume",
            )
        if failure is None and code != 143:
            problems = [asdict(problem) for problem in error.problems]
            self.tell(Failed(exit_code=error.exit_code, problems=problems))
        self.tell(Ended(exit_code=error.exit_code))
        return error

    def _make_room(self) -> bool:
        """Clear the way for this run; False when it is finished already and may stay so."""
        output = self.config.output
        is_finished = (self.output_dir / DONE).exists()
        if is_finished and output.on_finished == "stop":
            return False
        before = read_digest(self.output_dir)
        if is_finished or (before is not None and output.resume == "never"):
            self._moved_to = archive(self.output_dir)
        elif before is not None and before != self.config.digest():
            has_checkpoint = any((self.output_dir / "checkpoints").glob("step-*"))
            if not has_checkpoint:
                self._moved_to = archive(self.output_dir)
                return True
            changed = changes(self.output_dir / RESOLVED, self.settings.redacted())
            raise ConfigError.of(
                "the output folder holds an unfinished run with another configuration",
                where=str(self.output_dir),
                why=f"changed since: {', '.join(changed) or 'a default'}",
                remedy="undo the change to resume, give another --run_name, or start anew with "
                "--resume never (the old run is moved aside, not removed)",
            )
        return True

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the output folder; the kernel frees the lock of processes that died."""
        with open_lock(self.output_dir / LOCK) as self._lock_file:
            file = self._lock_file
            until = time.monotonic() + ORPHAN_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                # A dead supervisor's worker is about to save and end.
                if is_alive(holder) or time.monotonic() > until:
                    raise BusyError.of(
                        "another run holds this output folder",
                        where=str(self.output_dir),
                        why=f"its lock is held by {holder}",
                        remedy="wait for it, stop it, or give another --run_name",
                    )
                time.sleep(0.1)
            file.seek(0)
            file.truncate()
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Pass the first stop signal to the worker; a third one ends it at once.

        A lost terminal stops the run too, unless nohup started it.
        """

        def forward(number: int, _frame: object) -> None:
            self._signals += 1
            worker = self._worker
            if worker is None or worker.poll() is not None:
                return
            if self._signals == 1:
                worker.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
            elif self._signals >= 3:
                worker.kill()

        stops = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        heard = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, forward) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _warnings(self) -> list[str]:
        """Return what the user should know before the worker begins."""
        moved = [f"the run that was here is now in {self._moved_to}"] if self._moved_to else []
        return [*moved, *self.settings.warnings]

    def _report(self) -> None:
        """Write the report; its failure is told, and no reason to fail the run."""
        try:
            write_report(self.output_dir)
        except Exception as error:
            self.tell(Warned(message=f"no report was written: {type(error).__name__}: {error}"))


def is_alive(holder: str) -> bool:
    """Tell whether the process that a lock names may be running; one elsewhere may."""
    words = holder.split()
    if len(words) != 4 or not words[1].isdigit() or words[3] != socket.gethostname():
        return True
    try:
        return psutil.Process(int(words[1])).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def cause_of(code: int) -> str:
    """Return how a worker ended, in words."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL: by the kernel for memory, or by someone)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _python_path() -> dict[str, str]:
    """Let the worker import this package from wherever the supervisor has it."""
    own = str(Path(__file__).resolve().parents[1])
    rest = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{own}{os.pathsep}{rest}" if rest else own}
