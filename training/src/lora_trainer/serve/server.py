"""The HTTP server of a run, in a thread of its own: bind, serve, stop.

The socket is bound and listening when `start` returns; the thread then imports the web framework,
and requests queue until it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import AccessError, ConfigError, UnavailableError
from .auth import own_names
from .gauges import Gauges
from .run_state import RunState

GRACE_SECONDS = 1
STOP_SECONDS = 3.0
if TYPE_CHECKING:
    from .app import Site

EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, never a default
BACKLOG = 512
LEAST_TOKEN = 8


class StatusServer:
    """The HTTP server of one run; with `make_site`, of what that makes."""

    def __init__(
        self,
        live: RunState,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        token: str = "",
        allowed_hosts: Iterable[str] = (),
        folder: Path | None = None,
        log: LogFollower | None = None,
        on_fault: Callable[[str], None] = lambda _: None,
        make_site: Callable[[Gauges], Site] | None = None,
    ) -> None:
        self.live = live
        self._make_site = make_site or self._pages
        self.host = host
        self.port = port
        self.gauges = Gauges(folder or Path())
        live.free_disk_bytes = lambda: self.gauges.free_disk_bytes
        self._token = token
        self._allowed_hosts = tuple(allowed_hosts)
        self._log = log
        self._on_fault = on_fault
        self._socket: socket.socket | None = None
        self._server: Any = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="status-server", daemon=True)

    @property
    def url(self) -> str:
        """Return the address at which this machine's browser finds the server."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{local}]' if ':' in local else local}:{self.port}"

    def start(self) -> None:
        """Bind at once and begin to serve.

        Raises:
            UnavailableError: the port is taken. AccessError, ConfigError: it cannot be bound.
        """
        self._socket = bind(self.host, self.port)
        self.port = self._socket.getsockname()[1]
        self.gauges.start()
        self._thread.start()

    def stop(self) -> None:
        """Close all connections and end the thread."""
        self._is_stopping = True
        if self._server is not None:
            self._server.should_exit = True
        self.gauges.stop()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        try:
            loop.run_until_complete(self._serve())
        except Exception as error:  # the run goes on; nobody waits at a dead port
            if self._socket is not None:
                self._socket.close()
            self._on_fault(f"the status server ended: {type(error).__name__}: {error}")
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def _pages(self, gauges: Gauges) -> Site:
        from .app import Pages

        return Pages(self.live, gauges, self._log.read if self._log else lambda: None)

    async def _serve(self) -> None:
        import uvicorn

        from . import limits
        from .app import make_app

        for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
            logging.getLogger(name).disabled = True  # a client's nonsense is no news
        site = self._make_site(self.gauges)
        app = make_app(
            site, names=own_names(self.host, self._allowed_hosts), token=self._token,
            port=self.port,
        )  # fmt: skip
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=limits.BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                h11_max_incomplete_event_size=limits.HEAD_BYTES,
                timeout_keep_alive=int(limits.REQUEST_SECONDS),
                timeout_graceful_shutdown=GRACE_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._server.should_exit = self._is_stopping
        beat = asyncio.create_task(site.run())
        try:
            assert self._socket is not None
            await self._server.serve([self._socket])
        finally:
            beat.cancel()


class LogFollower:
    """Feeds a run's log into what is known of it, as the file grows."""

    MOST_BYTES = 256 * 1024  # read at once; of more, the newest

    def __init__(self, live: RunState, path: Path) -> None:
        self._live = live
        self._path = path
        self._at = -1
        self._half = b""
        self._lock = threading.Lock()

    def read(self) -> None:
        """Take up what was written since the last time."""
        with self._lock, contextlib.suppress(OSError), self._path.open("rb") as file:
            size = file.seek(0, 2)
            if size < self._at:  # another file now
                self._at, self._half = 0, b""
            start = max(self._at, size - self.MOST_BYTES, 0)
            if start > self._at:
                self._half = b""
            file.seek(start)
            *lines, self._half = (self._half + file.read(self.MOST_BYTES)).split(b"\n")
            self._at = file.tell()
            for line in lines:
                self._live.add_log(line.decode("utf-8", "replace").rstrip("\r") or " ")


def read_token(path: str | None) -> str:
    """Return the token in a file; "" without a file.

    Raises:
        ConfigError: there is none in it.
    """
    if path is None:
        return ""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not ASCII text"
    else:
        if len(token.split()) == 1 and len(token) >= LEAST_TOKEN:
            return token
        why = f"a token must be a single word of at least {LEAST_TOKEN} characters"
    raise ConfigError.of(
        "the status server's token cannot be used", where=f"health_token_file {path}", why=why,
        remedy=f"openssl rand -hex 32 > {path}",
    )  # fmt: skip


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UnavailableError: the port is taken. AccessError, ConfigError: it cannot be bound.
    """
    where = f"health_port {port} on {host}"
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError.of(
            "the status server's address does not belong to this machine",
            where=f"health_host {host}", why=error.strerror or str(error),
            remedy="--health_host 127.0.0.1",
        ) from None  # fmt: skip
    bound = socket.socket(family, kind, number)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UnavailableError.of(
                "the status server's port is in use", where=where,
                why=f"{owner_of(port)} is listening on it",
                remedy="--health_port 0 (picks a free port), or stop the other process",
            ) from None  # fmt: skip
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AccessError.of(
                "no permission to use the status server's port", where=where,
                why=f"{error.strerror}: ports under 1024 are reserved for root",
                remedy="--health_port 8080",
            ) from None  # fmt: skip
        raise ConfigError.of(
            "the status server cannot start", where=where,
            why=error.strerror or str(error), remedy="--health_host 127.0.0.1",
        ) from None  # fmt: skip
    return bound


def owner_of(port: int) -> str:
    """Return who listens on a port, as far as this user may know."""
    try:
        pids = {
            one.pid
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
        }
        names = [f"pid {pid} ({psutil.Process(pid).name()})" for pid in sorted(filter(None, pids))]
    except (psutil.Error, OSError, RuntimeError):
        names = []
    return " and ".join(names) or "a process of another user, or of another container,"
