"""What a process knows of the others that a launcher has started with it.

The kernel reports a killed process at once, through the connections of gloo and NCCL. It reports
nothing of a host that has lost power or its network. So each process counts in the rendezvous
store, once a second; rank 0 reads all counts, and the others read that of rank 0. The store also
carries a failure to rank 0, which reports it for all, and marks a stop that has no signal behind
it: the worker of a supervisor that was killed saves with all others, which then end as if it were
lost, so that the launcher starts all again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, InternalError
from ..host.launcher import Launch
from ..run.events import Event, Failed, PhaseChanged, Warned, parse_line, progress_of
from ..run.protocol import PEER_LOST
from .channel import EventPipe, StopFlag

if TYPE_CHECKING:
    from ..model.ranks import Ranks
    from ..model.rendezvous import Meeting

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.2
LOST_SECONDS = 15.0  # without a beat
EXPLAIN_SECONDS = 3.0  # for the others to say that they are well
UNWIND_SECONDS = 5.0  # for a process that hangs in a collective
SAVING_SECONDS = 600.0  # for one that saves
LEFT, WELL = "left", "well"


class Peers:
    """The other processes; none, until `begin` is called."""

    def __init__(self, pipe: EventPipe, stop: StopFlag) -> None:
        self._pipe = pipe
        self._stop = stop
        self._emit = pipe.emit
        self._launch: Launch | None = None
        self._phase = ""
        self._is_over = threading.Event()
        self._watcher: threading.Thread | None = None

    def begin(self, launch: Launch) -> Meeting | None:
        """Meet the others and watch them from now on; None if there are none."""
        from ..model.rendezvous import client_of, connect, meet

        if launch.is_alone:
            return None
        # Most processes have little to write, and would not notice.
        self._pipe.stop_without_reader(self._mark_orphan)
        self._served = connect(launch)  # rank 0 may serve it: it lives as long as this object
        progress = progress_of(self._emit, "processes", launch.count)
        meeting = meet(
            self._served, launch.rank, launch.count, progress if launch.is_first else lambda _: None
        )
        self._hosts = meeting.hosts
        # An own connection: in the group's, a collective may be waiting.
        self._store = client_of(launch, LOST_SECONDS)
        self._key = meeting.key
        self._launch = launch
        self._lock = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._watcher.start()
        return meeting

    def beside(self, emit: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return an `emit` from which this knows the phase: a save is not interrupted."""

        def both(event: Event) -> None:
            if isinstance(event, PhaseChanged):
                self._phase = event.phase
            emit(event)

        return both

    def report(self, failure: Failed) -> bool:
        """Hand a failure to rank 0; return whether it has been."""
        if not self.is_followed:
            return False
        assert self._launch is not None
        try:
            self._set("failed", json.dumps([self._launch.rank, failure.to_line()]))
        except RuntimeError:
            return False
        return True

    @property
    def is_followed(self) -> bool:
        """Return whether rank 0 of a launcher's processes says why this one ends."""
        return self._launch is not None and not self._launch.is_first

    def explain(self) -> None:
        """Say which process is gone, after a collective has failed; on rank 0."""
        if self._launch is None:
            return
        self._is_over.set()
        with contextlib.suppress(RuntimeError):
            self._set(f"beat/{self._launch.rank}", WELL)
            until = time.monotonic() + EXPLAIN_SECONDS
            before = self._read(*self._beats())
            while self._launch.is_first:
                failed, *beats = self._read("failed", *self._beats())
                unwell = [
                    rank
                    for rank, beat in enumerate(beats)
                    if beat not in (WELL, LEFT) and beat == before[rank]
                ]
                if failed:
                    self._pass_on(failed)
                    return
                if time.monotonic() > until:
                    self._emit(self._lost(unwell, "its process has ended"))
                    return
                time.sleep(0.1)

    def _mark_orphan(self) -> None:
        """Mark the stop that follows as one for the want of this process's supervisor."""
        if self._launch is not None and not self._stop.is_set():
            with contextlib.suppress(RuntimeError):
                self._set("orphan", str(self._launch.rank))

    def have_orphan(self) -> bool:
        """Return whether a supervisor's death has stopped the run; rank 0 says whose."""
        if self._launch is None:
            return False
        try:
            (orphan,) = self._read("orphan")
        except RuntimeError:
            return False
        if orphan and self._launch.is_first:
            self._emit(self._lost([int(orphan)], "its supervisor was killed"))
        return bool(orphan)

    def have_finished(self) -> bool:
        """Wait until rank 0 has written everything; return whether it has.

        One that ended before could not take part in another start.
        """
        if self._launch is None:
            return True
        try:
            if self._launch.is_first:
                self._set("finished", "1")
                return True
            while True:
                finished, first = self._read("finished", "beat/0")
                if finished or first in (LEFT, WELL):
                    return bool(finished)
                time.sleep(POLL_SECONDS)
        except RuntimeError:
            return False

    def leave(self) -> None:
        """Stop watching: this process ends. Rank 0, where it serves the store, ends last."""
        self._is_over.set()
        if self._launch is None:
            return
        with contextlib.suppress(RuntimeError):
            if self._read(f"beat/{self._launch.rank}")[0] == WELL:
                return  # somebody is lost: nobody is waited for
            self._set(f"beat/{self._launch.rank}", LEFT)
            until = time.monotonic() + EXPLAIN_SECONDS
            while self._launch.is_first and not self._launch.has_agent_store:
                beats = self._read(*self._beats())
                if set(beats) <= {LEFT, WELL} or time.monotonic() > until:
                    return
                time.sleep(0.05)

    def _watch(self) -> None:
        assert self._launch is not None
        count = 0
        seen: dict[int, tuple[str, float]] = {}
        while not self._is_over.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
                failed, lost, *beats = self._read("failed", "lost", *self._beats())
            except RuntimeError as error:
                self._on_silence(str(error))
                return
            now = time.monotonic()
            for rank, beat in enumerate(beats):
                if rank not in seen or seen[rank][0] != beat:
                    seen[rank] = (beat, now)
            silence = {
                rank: now - since
                for rank, (beat, since) in seen.items()
                if beat != LEFT and rank != self._launch.rank
            }
            is_lost = max(silence.values(), default=0.0) > LOST_SECONDS
            # The processes of a host that is gone fell silent within a beat of each other.
            silent = [rank for rank, seconds in silence.items() if seconds > LOST_SECONDS / 2]
            if failed and self._launch.is_first:
                self._end(lambda text=failed: self._pass_on(text))  # type: ignore[misc]
            elif is_lost:
                why = f"no sign of life for {LOST_SECONDS:.0f} s"
                event = self._lost(silent, why)
                with contextlib.suppress(RuntimeError):
                    self._set("lost", "1")
                self._end(lambda event=event: self._emit(event))  # type: ignore[misc]
            elif lost or failed:
                self._end(lambda: None)

    def _beat(self, count: int) -> None:
        assert self._launch is not None
        with self._lock:
            if not self._is_over.is_set():  # the last word of this process is not overwritten
                self._store.set(f"{self._key}/beat/{self._launch.rank}", str(count))

    def _beats(self) -> list[str]:
        """Return the keys to look at: rank 0 looks at all."""
        assert self._launch is not None
        return [
            f"beat/{rank}" for rank in range(self._launch.count if self._launch.is_first else 1)
        ]

    def _on_silence(self, why: str) -> None:
        """End if nobody can be reached; stop with a checkpoint if only the store is gone."""
        assert self._launch is not None
        if self._is_over.is_set():
            return
        if "imeout" in why or "timed out" in why:
            event = self._lost([0], f"its host has not answered for {LOST_SECONDS:.0f} s")
            self._end(lambda: self._emit(event))
        elif self._launch.has_agent_store:
            # The launcher has been killed; the processes it has started are still here.
            self._emit(Warned(message=f"{self._launch.launcher} is gone: the run is stopped"))
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, say: Callable[[], None]) -> None:
        """Say why, let the main thread end or save, and end the process if it hangs."""
        self._is_over.set()
        say()
        until = time.monotonic() + UNWIND_SECONDS
        latest = time.monotonic() + SAVING_SECONDS
        while time.monotonic() < (latest if self._phase == "saving" else until):
            time.sleep(0.1)
        faulthandler.dump_traceback(all_threads=True)
        self._pipe.close()
        os._exit(PEER_LOST)

    def _pass_on(self, text: str) -> None:
        """Emit another rank's failure as the run's."""
        rank, line = json.loads(text)
        event = parse_line(line)
        if not isinstance(event, Failed):
            return
        problems = [
            problem | {"where": f"{problem['where']} ({self._name(rank)})".strip()}
            for problem in event.problems
        ]
        self._emit(replace(event, problems=problems))

    def _lost(self, ranks: list[int], why: str) -> Failed:
        names = ", ".join(map(self._name, ranks)) or "another rank"
        error = InternalError.of(
            f"lost {names}",
            where="processes that train together",
            why=why,
            remedy="start again, or let the launcher do it: the run resumes from its last "
            "checkpoint",
        )
        problems = [asdict(problem) for problem in error.problems]
        return Failed(exit_code=error.exit_code, problems=problems)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(f"{self._key}/{key}", value)

    def _read(self, *keys: str) -> list[str]:
        with self._lock:
            values: Any = self._store.multi_get([f"{self._key}/{key}" for key in keys])
        return [value.decode() for value in values]


def check_shared_folder(ranks: Ranks, step: int, output_dir: Path) -> None:
    """Check that all processes read the same checkpoints.

    Raises:
        ConfigError: they do not; raised on every rank.
    """
    least, most = ranks.least(step), -ranks.least(-step)
    if least != most:
        raise ConfigError.of(
            "the processes see different checkpoints",
            where=f"output_dir: {output_dir}",
            why=f"the newest is of step {most} for one host and of step {least} for another",
            remedy="put output_dir on a file system that all hosts mount at the same path",
        )
