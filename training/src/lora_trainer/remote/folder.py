"""A folder on an object store: read, written, listed and verified through fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..host.addresses import joined, protocol_of
from ..run_folder import RunFolder
from .faults import explained, is_wordless, kind_of, unsupported

ANSWER_SECONDS = 60.0  # how long a start waits for the store
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
BLOCK_BYTES = 1 << 20
Result = TypeVar("Result")


class RemoteFolder:
    """The entries below an address, by their names relative to it."""

    def __init__(self, address: str) -> None:
        """Open the address, without a request to the store.

        Raises:
            ConfigError: the protocol is unknown, or its package is not installed.
        """
        self.address = address.rstrip("/")
        self.reopen()

    def reopen(self) -> None:
        """Connect again, with the credentials that are there now."""
        self._system, self._root = _opened(self.address)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        try:
            return bytes(self._system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole."""
        self._system.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file if there is none, atomically where the store can; return whether it did."""
        try:
            self._system.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError):  # a store without conditional writes
            if self.read(name) is not None:
                return False
            self.write(name, content)
        return True

    def upload(self, file: Path, name: str) -> None:
        """Upload a local file."""
        self._system.put_file(str(file), self._path(name))

    def download(self, name: str, file: Path) -> None:
        """Download a file to the local disk, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.writing")
        try:
            self._system.get_file(self._path(name), str(beside))
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)

    def sha256(self, name: str) -> str:
        """Read a file back and return its hash."""
        digest = hashlib.sha256()
        with self._system.open(self._path(name), "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def listed(self, under: str = "") -> dict[str, dict[str, Any]]:
        """Return every file below the address, with the store's facts about it."""
        start = self._path(under) if under else self._root
        self._system.invalidate_cache()
        try:
            entries = self._system.find(start, detail=True)
        except FileNotFoundError:
            return {}
        prefix = f"{self._root.rstrip('/')}/"
        return {
            path[len(prefix) :]: info for path, info in entries.items() if path.startswith(prefix)
        }

    def is_file(self) -> bool:
        """Return whether the address itself is a file."""
        return bool(self._system.isfile(self._root))

    def version(self, name: str) -> str:
        """Return a value that changes whenever the file does."""
        return str(self._system.ukey(self._path(name) if name else self._root))

    def remove(self, name: str) -> None:
        """Remove a file; it may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def copy(self, name: str, target: RemoteFolder) -> None:
        """Copy a file to another folder of the same store."""
        self._system.cp_file(self._path(name), target._path(name))

    def numbered(self, number: int) -> RemoteFolder:
        """Return the numbered folder beside this one; for a whole bucket, one inside it."""
        is_bucket = "/" not in self.address.partition("://")[2].strip("/")
        address = joined(self.address, "run") if is_bucket else self.address
        return RemoteFolder(f"{address}.{number}")

    def worded(self, error: Exception) -> Exception:
        """Return the error with its reason, from a request whose answer contains one."""
        if is_wordless(error):
            try:
                self.listed(RunFolder.lock)
            except Exception as worded:
                return worded
        return error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


def _opened(address: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.registry import known_implementations, registry

    protocol = protocol_of(address)
    if protocol not in known_implementations and protocol not in registry:
        raise ConfigError.of(
            f"{protocol}:// is an unknown protocol",
            where=address,
            why="fsspec has no implementation of that name",
            remedy="use s3://, gs://, az:// or a local folder",
        )
    options: dict[str, Any] = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    try:
        system, root = fsspec.url_to_fs(
            address, use_listings_cache=False, skip_instance_cache=True, **options
        )
    except ImportError as error:
        raise unsupported(address, _package_of(protocol)) from error
    return system, str(root).rstrip("/")


def _package_of(protocol: str) -> str:
    """Return the package that implements a protocol."""
    from fsspec.registry import known_implementations

    module = str(known_implementations[protocol]["class"]).partition(".")[0]
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
        return str(known_implementations[protocol].get("err", module))
    return module


def check(address: str) -> None:
    """Verify that files can be written, read, listed and removed at an address; leave none there.

    Raises:
        AccessError, StorageError, UnavailableError, ConfigError: it cannot.
    """
    folder, name = RemoteFolder(address), f".writable-{uuid.uuid4().hex[:8]}"

    def prove() -> None:
        folder.write(name, b"x")
        assert folder.read(name) == b"x"
        folder.listed(name)
        folder.remove(name)

    answered(folder, prove)


def answered(
    folder: RemoteFolder, call: Callable[[], Result], seconds: float = ANSWER_SECONDS
) -> Result:
    """Return what a call returns, retrying a few times after transient faults.

    Raises:
        TrainerError: it fails, or does not answer in time.
    """
    outcome: list[Result] = []
    fault: list[BaseException] = []
    is_late = threading.Event()

    def attempt() -> None:
        for number in range(ATTEMPTS):
            fault.clear()
            try:
                outcome.append(call())
            except Exception as error:
                fault.append(folder.worded(error))
                is_last = kind_of(fault[0]) != "transient" or number == ATTEMPTS - 1
                if is_last or is_late.wait(FIRST_PAUSE_SECONDS * 2**number):
                    return
            else:
                return

    # A library that never answers must not keep the program from ending.
    thread = threading.Thread(target=attempt, name="object store", daemon=True)
    thread.start()
    thread.join(seconds)
    is_late.set()
    if outcome:
        return outcome[0]
    error = fault[0] if fault else TimeoutError(f"no answer within {seconds:.0f} s")
    raise explained(error, folder.address) from error
