"""Mirror a run's local folder to its remote one, in a thread that training never waits for.

Each pass compares both and transfers the differences, so after a fault the next pass simply does
the rest. The order lets readers see only complete things: a checkpoint's manifest follows its
files, the checksums of `final_model` follow its files, and DONE comes last. Older checkpoints are
removed remotely only once a newer one has been read back.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..checkpoint_folder import CorruptCheckpointError, listed, read_state, step_of, verify
from ..errors import BusyError, TrainerError
from ..host.disk import CHECKSUMS
from ..run_folder import RunFolder, is_own
from ..units import duration
from . import checkpoints
from .faults import explained, kind_of, reason
from .folder import RemoteFolder
from .lease import Lease

PASS_SECONDS = 30.0  # between two passes without a new checkpoint
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0  # between two attempts
QUIET_SECONDS = 10.0  # a fault that passes sooner is not worth a warning
# Not of the run, true of this machine alone, or written at the end.
NOT_MIRRORED = frozenset(
    {
        RunFolder.lock, RunFolder.server, RunFolder.done, RunFolder.archiving,
        RunFolder.checkpoints, RunFolder.final_model, RunFolder.unfinished_model,
    }
)  # fmt: skip
Stamp = tuple[int, int]


class Mirror:
    """The thread that mirrors a run, and its last error."""

    def __init__(self, folder: RemoteFolder, local: Path, lease: Lease, *, keep: int) -> None:
        self._folder, self._local, self._lease, self._keep = folder, local, lease, keep
        self._run = RunFolder(local)
        self._uploaded: dict[str, Stamp] = {}
        self._steps: set[int] = set()  # of the checkpoints there that were read back
        self._read_back: set[tuple[str, str]] = set()  # of the checkpoint on its way
        self._is_open = False  # DONE is not there
        self._wake, self._ended = threading.Event(), threading.Event()
        self._is_loss_known = False
        self._passes = 0
        self._fault: BaseException | None = None
        self._faulty_since = 0.0
        self._next_warning = QUIET_SECONDS
        self._mirrored_step = 0
        self._mirrored_time = self._start_time = time.monotonic()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start mirroring."""
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Mirror now: there is a new checkpoint."""
        self._wake.set()

    def warning(self) -> str:
        """Return a warning about a persistent fault; empty otherwise, and between two warnings."""
        if self._lease.is_lost and not self._is_loss_known:
            self._is_loss_known = True
            return (
                f"nothing is mirrored any more: {self._lease.holder} has taken over "
                f"{self._folder.address}; this run's files are in {self._local}"
            )
        fault, lasted = self._fault, time.monotonic() - self._faulty_since
        if fault is None or (lasted < self._next_warning and kind_of(fault) == "transient"):
            return ""
        if self._next_warning == float("inf"):
            return ""
        # New credentials may come, and a disk may be freed: one warning says all there is to say.
        is_passing = kind_of(fault) == "transient"
        self._next_warning = max(lasted, self._next_warning) * 2 if is_passing else float("inf")
        return (
            f"nothing is mirrored to {self._folder.address} at present: {reason(fault)}. "
            f"{self._age()}; training goes on, its files are in {self._local}"
        )

    def _age(self) -> str:
        now = time.monotonic()
        if not self._mirrored_step:
            return f"No checkpoint has been mirrored in {duration(now - self._start_time)}"
        ago = duration(now - self._mirrored_time)
        return f"The last mirrored checkpoint is of step {self._mirrored_step}, {ago} ago"

    def flush(self, seconds: float, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything that exists now has been mirrored.

        Raises:
            TrainerError: the store rejects it, or is too slow.
        """
        assert self._thread is not None
        until, wanted = time.monotonic() + seconds, self._passes + 2
        self._wake.set()
        while self._passes < wanted and self._thread.is_alive():
            fault = self._fault
            is_final = fault is not None and kind_of(fault) != "transient"
            if time.monotonic() > until or is_hurried() or is_final:
                break
            time.sleep(0.05)
            if self._passes < wanted:
                self._wake.set()
        if self._lease.is_lost:
            raise BusyError.of(
                "another run has taken over this output folder",
                where=self._folder.address,
                why=f"{self._lease.holder} writes there now; this run's files are in {self._local}",
                remedy="use another --run_name",
            )
        if self._passes < wanted:
            error = self._fault or TimeoutError("the upload takes too long")
            lost = f"nothing is lost: the run is in {self._local}"
            raise explained(error, self._folder.address, lost=lost) from error

    def stop(self) -> None:
        """End the thread after its current transfer."""
        self._ended.set()
        self._wake.set()

    def _loop(self) -> None:
        attempt = 0
        while not self._ended.is_set() and not self._lease.is_lost:
            self._wake.clear()
            try:
                self._pass()
            except Exception as error:
                if self._fault is None:
                    self._faulty_since = time.monotonic()
                self._fault = fault = self._folder.worded(error)
                pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**attempt)
                attempt = min(attempt + 1, 20)
                self._ended.wait(pause * random.uniform(0.5, 1))  # noqa: S311
                if kind_of(fault) == "refused":
                    with contextlib.suppress(TrainerError):
                        self._folder.reopen()
                continue
            attempt, self._fault, self._next_warning = 0, None, QUIET_SECONDS
            self._passes += 1
            self._wake.wait(PASS_SECONDS)

    def _pass(self) -> None:
        # DONE may be written during the pass, after files that the pass has seen already.
        is_done = self._run.done.exists()
        if not is_done and not self._is_open:
            self._withdraw(RunFolder.done)
            self._is_open = True
        for path in self._due():
            with _unless_gone(path):
                self._mirror_checkpoint(path)
        self._mirror_files()
        self._remove_old()
        self._mirror_model()
        if is_done:
            self._mirror_file(self._run.done, RunFolder.done)
            self._is_open = False

    def _due(self) -> list[Path]:
        """Return the checkpoints to transfer: the best one so far, then the newest."""
        paths = listed(self._run.checkpoints)
        for path in reversed(paths):
            if step_of(path.name) in self._steps:
                break
            if _verifies(path):
                best = read_state(path)["state"].get("best_step")
                bests = [one for one in paths if step_of(one.name) == best and _verifies(one)]
                wanted = dict.fromkeys((*bests, path))
                return [one for one in wanted if step_of(one.name) not in self._steps]
        return []

    def _mirror_checkpoint(self, path: Path) -> None:
        checkpoints.upload(self._folder, path, self._mirror_files, self._read_back)
        self._read_back.clear()
        step = step_of(path.name)
        assert step is not None
        self._steps.add(step)
        self._mirrored_step, self._mirrored_time = step, time.monotonic()

    def _remove_old(self) -> None:
        """Remove what the run itself has removed, once newer ones are there."""
        here = {step_of(path.name) for path in listed(self._run.checkpoints)}
        there = checkpoints.steps_listed(self._folder)
        if not self._steps or not here:
            return
        newest = max(self._steps)
        kept = {*here, *[step for step in there if step <= newest][-self._keep :]}
        checkpoints.discard(self._folder, [step for step in there if step not in kept])
        self._steps.intersection_update(kept)

    def _mirror_files(self) -> None:
        for path in sorted(self._local.iterdir()):
            if is_own(path.name) and path.name not in NOT_MIRRORED and path.name[0] != ".":
                for file in [path] if path.is_file() else _files_below(path):
                    self._mirror_file(file, file.relative_to(self._local).as_posix())

    def _mirror_model(self) -> None:
        """Transfer the exported adapter, checksums last, and read back the files that they list."""
        model = self._run.final_model
        sums = model / CHECKSUMS
        if not sums.is_file() or self._uploaded.get(f"{model.name}/{CHECKSUMS}") == _stamp(sums):
            return
        there, text = self._folder.read(f"{model.name}/{CHECKSUMS}"), sums.read_bytes()
        if there == text:  # an earlier process wrote them, after it had read the files back
            self._mirror_file(model / "README.md", f"{model.name}/README.md")
            self._uploaded[f"{model.name}/{CHECKSUMS}"] = _stamp(sums)
            return
        if there is not None:
            self._withdraw(f"{model.name}/{CHECKSUMS}")
        for file in _files_below(model):
            if file != sums:
                self._mirror_file(file, f"{model.name}/{file.relative_to(model).as_posix()}")
        for line in sums.read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition("  ")
            if self._folder.sha256(f"{model.name}/{name}") != digest:
                self._uploaded.pop(f"{model.name}/{name}", None)
                raise OSError(f"{model.name}/{name} has other content in the store")
        self._mirror_file(sums, f"{model.name}/{CHECKSUMS}")

    def _mirror_file(self, file: Path, name: str) -> None:
        with _unless_gone(file):
            stamp = _stamp(file)
            if self._uploaded.get(name) != stamp:
                self._folder.upload(file, name)
                self._uploaded[name] = stamp

    def _withdraw(self, name: str) -> None:
        """Remove a file that marks something as complete while it is not."""
        self._folder.remove(name)
        self._uploaded.pop(name, None)


@contextlib.contextmanager
def _unless_gone(path: Path) -> Iterator[None]:
    """Skip files that the run has removed meanwhile; a missing place in the store is an error."""
    try:
        yield
    except FileNotFoundError:
        if path.exists():
            raise


def _verifies(checkpoint: Path) -> bool:
    with contextlib.suppress(CorruptCheckpointError):
        verify(checkpoint)
        return True
    return False


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def archive(folder: RemoteFolder) -> str:
    """Copy a run's files to a numbered folder beside it, then remove them; return its address.

    Raises:
        OSError and others: the store's; nothing is removed before everything is copied.
    """
    names = [name for name in folder.listed() if _is_of_run(name)]
    if not names:
        return ""
    number = 1
    while (aside := folder.numbered(number)).listed():
        number += 1
    for name in names:
        folder.copy(name, aside)
    for name in sorted(names, key=_withdrawn_first):
        folder.remove(name)
    return aside.address


def _is_of_run(name: str) -> bool:
    return is_own(name.partition("/")[0])


def _withdrawn_first(name: str) -> tuple[bool, str]:
    last = name.rpartition("/")[2]
    return last not in (RunFolder.done, "manifest.json", CHECKSUMS), name
