"""Mirror a run's local output folder to its object store; `NoMirror` for a run without one.

Only the supervisor does this: the worker reads and writes the local folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config.settings import Settings
from ..errors import TrainerError
from ..remote import mirror, restore
from ..remote.faults import explained
from ..remote.folder import RemoteFolder
from ..remote.lease import Lease
from ..run.events import CheckpointSaved, Event
from ..run.folder import archive, output_address, output_folder
from ..run_folder import RunFolder

END_SECONDS = 600.0  # how long a finished run waits for the store
STOP_SECONDS = 60.0  # how long one that was stopped or failed waits


class NoMirror:
    """A run whose output folder is a local one."""

    address = ""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold nothing."""
        yield

    def begin(self, *, has_work: bool) -> None:
        """Mirror nothing."""

    def archive(self, local: Path) -> Path | str:
        """Move the earlier run aside; return where it is now."""
        return archive(local)

    def take_up(self, event: Event) -> None:
        """Ignore the event."""

    def warnings(self) -> list[str]:
        """Return no warnings."""
        return []

    def complete(self) -> None:
        """Wait for nothing."""


class StoreMirror(NoMirror):
    """A run whose output folder is on an object store."""

    def __init__(
        self,
        settings: Settings,
        address: str,
        say: Callable[[str], None],
        is_hurried: Callable[[], bool],
    ) -> None:
        self.address = address
        self._local = output_folder(settings)
        self._keep = settings.config.output.save_total_limit
        self._say, self._is_hurried = say, is_hurried
        self._folder: RemoteFolder | None = None
        self._mirror: mirror.Mirror | None = None
        self._lease: Lease | None = None
        self._notes: list[str] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the remote folder and bring the run from there; at the end, mirror what is left.

        Raises:
            BusyError: another run holds it. AccessError, StorageError, UnavailableError: the
            store's.
        """
        self._folder = folder = RemoteFolder(self.address)
        self._lease = lease = Lease(folder, self._local)
        lease.take(self._say)
        try:
            with self._explained():
                self._bring(folder, lease)
            lease.remember()
            yield
        except BaseException:
            self._leave()
            raise
        finally:
            if self._mirror is not None:
                self._mirror.stop()
            lease.release()

    def begin(self, *, has_work: bool) -> None:
        """Begin to mirror; a run without work to do is completed there at once."""
        assert self._folder is not None
        assert self._lease is not None
        self._say(f"output: {self.address}, mirrored from {self._local}")
        self._mirror = mirror.Mirror(self._folder, self._local, self._lease, keep=self._keep)
        self._mirror.start()
        if not has_work:
            self.complete()

    def archive(self, local: Path) -> Path | str:
        """Move the earlier run aside in the store, and locally what the store does not have."""
        assert self._folder is not None
        with self._explained():
            done = self._folder.read(RunFolder.done)
            is_whole = done is not None and done == _content(RunFolder(local).done)
            aside = mirror.archive(self._folder)
        if not is_whole:
            return archive(local)
        restore.clear(local)
        return aside

    def take_up(self, event: Event) -> None:
        """Mirror a new checkpoint at once."""
        if self._mirror is not None and isinstance(event, CheckpointSaved):
            self._mirror.wake()

    def warnings(self) -> list[str]:
        """Return the warnings that are due."""
        notes, self._notes = self._notes, []
        warning = self._mirror.warning() if self._mirror is not None else ""
        return [*notes, *([warning] if warning else [])]

    def complete(self) -> None:
        """Wait until everything is in the store.

        Raises:
            TrainerError: the store rejects it; everything is in the local folder.
        """
        if self._mirror is not None:
            self._mirror.flush(END_SECONDS, self._is_hurried)

    def _leave(self) -> None:
        """Mirror what an unfinished run has left, as far as time allows."""
        if self._mirror is None:
            return
        try:
            self._mirror.flush(STOP_SECONDS, self._is_hurried)
        except TrainerError as error:
            self._say(f"warning: not everything was mirrored: {error}; {self._local} has it all")

    def _bring(self, folder: RemoteFolder, lease: Lease) -> None:
        """Bring the run from the store, unless this folder was the last to write there."""
        has_own = any(
            (self._local / name).exists() for name in (RunFolder.digest, RunFolder.events)
        )
        if (lease.was_ours and has_own) or not restore.has_run(folder):
            return
        if has_own and restore.is_subsumed(folder, self._local):
            restore.clear(self._local)
        elif has_own:
            self._notes.append(
                f"{self.address} has another run, which counts; the one in {self._local} is now in "
                f"{archive(self._local)}"
            )
        self._say(f"continuing the run in {self.address}")
        skipped = restore.bring(folder, self._local)
        self._notes += [f"{one}; skipped, as damaged" for one in skipped]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise explained(error, self.address) from error


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def mirror_of(
    settings: Settings, say: Callable[[str], None], is_hurried: Callable[[], bool]
) -> NoMirror:
    """Return the mirror of a run with these settings."""
    address = output_address(settings)
    return StoreMirror(settings, address, say, is_hurried) if address else NoMirror()
