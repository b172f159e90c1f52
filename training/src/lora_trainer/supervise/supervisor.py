"""Starts, watches, restarts and stops the worker; owns the lock, events.jsonl and the exit code.

Imports no torch: it must respond from the first moment and outlive every failure of the worker.
Only the supervisor receives signals; it forwards them once, and the worker, in a session of its
own, saves a checkpoint at the next step boundary and ends.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any

from ..config.settings import Settings
from ..errors import InternalError, MemoryKilledError, Problem, TrainerError, UnavailableError
from ..host.disk import write_json, write_text
from ..host.interrupts import handled
from ..host.launcher import Launch
from ..machine import read_machine
from ..plan import process_count
from ..run import lock
from ..run.events import (
    Ended,
    Event,
    Failed,
    Finished,
    Restarted,
    RunStarted,
    Stopped,
    Warned,
)
from ..run.folder import make_folder, name_of_run, output_folder
from ..run.protocol import EVENTS_FD, WorkerSpec
from ..run.recording import EventFile, parse_lines
from ..run.status import RunStatus
from ..run_folder import RunFolder
from ..serve.run_state import RunState
from ..serve.server import LogFollower, StatusServer, read_token
from . import earlier_run, endings
from .announcement import announced
from .endings import WorkerEnd
from .log_filter import open_log
from .mirroring import mirror_of
from .recovery import Recovery
from .restarts import Restarts
from .secrets import redaction_of
from .stop_signals import STOPS, StopSignals
from .watchdog import Watchdog
from .workers import WorkerGroup, cause_of

STALLED = InternalError.exit_code
WATCH_SECONDS = 1.0  # between two looks at a worker
PIPE_BYTES = 1 << 16


class Supervisor:
    """One run, from lock to exit code. `display` receives every event with the status after it.

    `print_line` receives text that is worth a line but is no event.
    """

    def __init__(
        self,
        settings: Settings,
        display: Any,
        *,
        print_line: Callable[[str], None] = lambda _: None,
        launch: Launch | None = None,
    ) -> None:
        self.settings = settings
        self.display = display
        self.print_line = print_line
        self.config = settings.config
        self.output_dir = output_folder(settings)
        self.folder = RunFolder(self.output_dir)
        self.run_name = name_of_run(settings)
        monitoring = self.config.monitoring
        self._token = read_token(monitoring.health_token_file)
        self.redaction = redaction_of(settings)
        self.live = RunState(self.redaction, monitoring.stall_timeout_seconds)
        self._events: EventFile | None = None
        self.launch = launch
        self._processes = 1 if launch else process_count(self.config, read_machine())
        self._lock_file: IO[str] | None = None
        self._problems: Sequence[Problem] = ()  # that the run ended with
        self._notes: list[str] = []
        self._warned: set[str] = set()
        self._signals = StopSignals(is_launched=launch is not None)
        self._mirror = mirror_of(settings, print_line, lambda: self._signals.count > 1)

    @property
    def status(self) -> RunStatus:
        """Return all that is known of the run."""
        return self.live.status

    def run(self, check: Callable[[Settings], None] = lambda _: None) -> int:
        """Do the whole run, `check` first; return 0.

        Raises:
            TrainerError: with the exit code of whatever ended it otherwise.
        """
        with (
            announced(self),
            self._leaving_refusal(),
            self._serving() as server,
            self._locked(check) as has_work,
        ):
            if has_work:
                with self._address_in_folder(server):
                    with self._recording():
                        self._restart_loop()
                    # Last of all: without it, the next start completes what is missing.
                    write_text(self.folder.done, f"{time.time():.0f}\n")
                    self._mirror.complete()
        return 0

    @contextlib.contextmanager
    def _leaving_refusal(self) -> Iterator[None]:
        """Leave results.json where a start is refused before it has recorded anything."""
        try:
            yield
        except TrainerError as error:
            if self._events is None and not earlier_run.has_traces(self.output_dir):
                endings.leave_refusal(self.output_dir, self.run_name, error, self.redaction)
            raise

    @contextlib.contextmanager
    def _locked(self, check: Callable[[Settings], None]) -> Iterator[bool]:
        """Check, hold the folder's lock and make room; yield whether there is work to do."""
        self.live.detail = "checking the configuration"
        check(self.settings)
        make_folder(self.output_dir)
        with (
            lock.hold(self.output_dir) as self._lock_file,
            handled(self._signals.handle, STOPS),
            self._mirror.held(),
        ):
            verdict = earlier_run.judge(self.output_dir, self.settings)
            has_work = verdict.does != "nothing"
            if has_work:
                self._make_room(verdict)
            else:
                for line in verdict.notes:
                    self.print_line(line)
            self._mirror.begin(has_work=has_work)
            yield has_work

    def _make_room(self, verdict: earlier_run.Verdict) -> None:
        """Move an earlier run aside where it has to go, and leave this one's settings."""
        self._notes = [*verdict.notes]
        if verdict.does == "move aside":
            aside = self._mirror.archive(self.output_dir)
            self._notes.append(f"the run that was here is now in {aside}")
        # Until this start has ended, only events.jsonl is true of the run.
        self.folder.results.unlink(missing_ok=True)
        write_json(self.folder.resolved, self.redaction.value(self.settings.redacted()))
        earlier_run.mark_of(self.config).write(self.output_dir)

    @contextlib.contextmanager
    def _address_in_folder(self, server: StatusServer) -> Iterator[None]:
        """Leave the server's address in the folder until it stops answering."""
        write_json(self.folder.server, {"url": server.url, "pid": os.getpid()})
        try:
            yield
        finally:
            # Go on answering for as long as asked, or until a signal comes.
            until = time.monotonic() + self.config.monitoring.health_linger_seconds
            while time.monotonic() < until and not self._signals.count:
                time.sleep(0.1)
            with contextlib.suppress(OSError):
                self.folder.server.unlink()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Take up what was recorded before, record what happens, and leave the results."""
        self.live.replay(self.folder.events)
        self.live.detail = ""
        with EventFile(self.folder.events) as self._events:
            try:
                yield
            finally:
                self._leave_results()

    def record(self, event: Event) -> None:
        """Record an event, take it up, show it; without secrets."""
        assert self._events is not None
        if isinstance(event, Finished):
            event = endings.with_outcome(event, self.status, self.output_dir)
        event = self.redaction.event(event)
        self._events.append(event)
        self._mirror.take_up(event)
        self.display(event, self.live.add(event))

    @contextlib.contextmanager
    def _serving(self) -> Iterator[StatusServer]:
        """Answer over HTTP, from before the first check until the end."""
        monitoring = self.config.monitoring
        server = StatusServer(
            self.live,
            host=monitoring.health_host,
            port=monitoring.health_port,
            token=self._token,
            allowed_hosts=monitoring.health_allowed_hosts,
            folder=self.output_dir,
            log=LogFollower(self.live, self.folder.log),
            on_fault=self.print_line,
        )
        try:
            server.start()
        except UnavailableError:
            make_folder(self.output_dir)
            with lock.hold(self.output_dir):  # a run of this very folder says more than its port
                raise
        self.print_line(f"status: {server.url}")
        try:
            yield server
        finally:
            server.stop()

    def _restart_loop(self) -> None:
        """Start the worker until it finishes, fails for good, or uses up its restarts."""
        # One of several processes cannot start again without the others.
        is_shared = self.launch is not None and not self.launch.is_alone
        restarts = Restarts(0 if is_shared else self.config.monitoring.max_restarts)
        recovery = Recovery(self.output_dir)
        while True:
            self.record(
                RunStarted(
                    run_name=self.run_name,
                    config_digest=self.config.digest(),
                    output_dir=str(self.output_dir),
                    attempt=restarts.attempt,
                    pid=os.getpid(),
                )
            )
            for warning in self._warnings() if restarts.attempt == 0 else ():
                self.record(Warned(message=warning))
            end = self._one_attempt()
            if end.code == 0:
                try:
                    self._mirror.complete()
                except TrainerError as unmirrored:
                    raise self._recorded_end(unmirrored) from unmirrored
                self.record(Ended(exit_code=0))
                return
            if not self._signals.count and (retry := recovery.after(end, self.status)):
                for event in retry.events:
                    self.record(event)
                if self.launch is not None and is_shared:
                    launcher, is_memory = self.launch.launcher, end.is_out_of_memory
                    error = endings.left_to_launcher(retry.cause, is_memory, launcher)
                    raise self._recorded_end(error)
                attempt = restarts.spare()
                self.record(Restarted(attempt=attempt, cause=retry.cause, exit_code=end.code))
                continue
            if end.failure:
                error = endings.failed(end.failure, self.status)
                is_recorded = endings.is_recorded_at_once(end.failure)
                raise self._recorded_end(error, is_recorded=is_recorded)
            if end.code == 143 or self._signals.count:
                raise self._stopped()
            refusal = restarts.refusal(self.status)
            if refusal or end.code in endings.FINAL_CODES:
                error = endings.given_up(end, self.status, self.output_dir, refusal)
                raise self._recorded_end(error)
            attempt = restarts.take(self.status)
            self.record(Restarted(attempt=attempt, cause=end.cause, exit_code=end.code))

    def _one_attempt(self) -> WorkerEnd:
        """Run one worker to its end; return how it ended (`STALLED` if the watchdog killed it).

        The worker inherits the lock: if only this process is killed, no other run starts before the
        worker has noticed, saved and ended.
        """
        assert self._lock_file is not None
        reading, writing = os.pipe()
        log_file = self.folder.log
        log_bytes = log_file.stat().st_size if log_file.exists() else 0
        with open_log(log_file, self.redaction, self._warn) as log, os.fdopen(reading):
            worker = WorkerGroup(
                WorkerSpec(
                    self.config,
                    self.output_dir,
                    self.run_name,
                    launch=self.launch,
                    redaction=self.redaction,
                ),
                self._processes,
                log=log,
                pass_fds=(writing, self._lock_file.fileno()),
                environment={EVENTS_FD: str(writing)},
            )
            os.close(writing)
            self._signals.pass_to(worker)
            stall_seconds = self.config.monitoring.stall_timeout_seconds
            watch = Watchdog(worker.pids, log_file, stall_seconds)
            failure, stall = self._read_events(reading, watch)
            code = worker.wait()
        if failure is None and not stall:
            failure = endings.failure_in_log(code, log_file, log_bytes)
            if failure and endings.is_recorded_at_once(failure):
                self.record(failure)
        # Once it has said why it gives up, a second fault while it ends changes nothing.
        if failure is not None:
            is_memory = failure.retry == MemoryKilledError.KIND
            return WorkerEnd(failure.exit_code, failure.problems[0]["what"], failure, is_memory)
        if code == -signal.SIGKILL and watch.was_out_of_memory():
            cause = f"{worker.fallen}was killed by the kernel for memory"
            return WorkerEnd(code, cause, is_out_of_memory=True)
        return WorkerEnd(STALLED if stall else code, stall or f"{worker.fallen}{cause_of(code)}")

    def _read_events(self, reading: int, watch: Watchdog) -> tuple[Failed | None, str]:
        """Record the worker's events until it has ended, and check it about once a second.

        Returns its failure, if it reported one, and its stall, if it was killed for one.
        """
        failure: Failed | None = None
        stall, torn = "", b""
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            checked = time.monotonic()
            while True:
                if selector.select(WATCH_SECONDS):
                    heard = os.read(reading, PIPE_BYTES)
                    if not heard:
                        return failure, stall
                    *lines, torn = (torn + heard).split(b"\n")
                    events = parse_lines(lines)
                    for event in map(self.redaction.event, events):
                        # All ranks may report the same failure: once is enough.
                        if not isinstance(event, Failed):
                            self.record(event)
                        elif not failure:
                            failure = event
                            if endings.is_recorded_at_once(failure):
                                self.record(event)
                if time.monotonic() - checked >= WATCH_SECONDS:
                    checked = time.monotonic()
                    self._signals.look_for_launcher()
                    stall = stall or self._end_if_stalled(watch)

    def _end_if_stalled(self, watch: Watchdog) -> str:
        """Warn about shortages; log the stacks of a stalled worker, kill it and return why."""
        for warning in (*watch.warnings(self.status), *self._mirror.warnings()):
            self.record(Warned(message=warning))
        stall = watch.stall(self.status, self.live.silence.look())
        if stall:
            stacks = f"its stacks go to {RunFolder.log}, then it is ended"
            self.record(Warned(message=f"the worker {stall}; {stacks}"))
            if not watch.record_stacks():
                self.record(Warned(message="the stalled worker wrote no stack traces"))
            watch.end()
        return stall

    def _stopped(self) -> TrainerError:
        """Return the error of a run that was stopped, and record it as the last events."""
        if self.status.phase != "stopped":
            self.record(Stopped(step=endings.saved_step(self.output_dir), signal="SIGTERM"))
        return self._recorded_end(endings.stopped(self.status, self.output_dir), is_recorded=True)

    def _recorded_end(self, error: TrainerError, *, is_recorded: bool = False) -> TrainerError:
        """Record the error that ends the run as the last events; return it."""
        if not is_recorded:
            problems = [asdict(problem) for problem in error.problems]
            self.record(Failed(exit_code=error.exit_code, problems=problems))
        self.record(Ended(exit_code=error.exit_code))
        self._problems = error.problems
        return error

    def _warn(self, message: str) -> None:
        """Record a warning, once whatever the attempt."""
        if message not in self._warned:
            self._warned.add(message)
            self.record(Warned(message=message))

    def _warnings(self) -> list[str]:
        """Return what the user should know before the worker begins."""
        warnings = [*self._notes]
        if self.redaction.text(str(self.output_dir)) != str(self.output_dir):
            warnings.append(
                "the output folder's name contains a secret, shown as ***: choose another name"
            )
        if skipped := self.live.lines_skipped:
            lines = "1 line" if skipped == 1 else f"{skipped} lines"
            warnings.append(
                f"{lines} of {RunFolder.events} skipped: no event, or a field of another type"
            )
        return [*warnings, *self.settings.warnings]

    def _leave_results(self) -> None:
        """Write results and report."""
        run = (self.output_dir, self.status, self._problems, self.redaction)
        endings.leave_all(*run, lambda message: self.record(Warned(message=message)))
