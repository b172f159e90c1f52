"""Serves recorded runs, finished or still going on, from their output folders alone.

Reads and follows `events.jsonl`, and offers the same endpoints as the run's own server. Writes
nothing to the folder and takes no lock.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, UnavailableError
from ..redaction import Redaction
from ..run.lock import own_address
from ..run.summary import run_folders
from ..run_folder import RunFolder
from .follower import FOLLOW_SECONDS, EventFollower, stall_timeout_seconds
from .gauges import Gauges
from .run_state import RunState
from .server import LogFollower, StatusServer, read_token

if TYPE_CHECKING:
    from .app import Site

USUAL_PORT = 8080


def view(
    folder: Path,
    *,
    host: str,
    port: int | None,
    token_file: str | None,
    allowed_hosts: Iterable[str],
    say: Callable[[str], None],
) -> None:
    """Serve a folder's run, or its runs, until a signal comes; port None: the usual one, or any.

    Raises:
        ConfigError: there is no run. UnavailableError: the port is taken.
    """
    runs = run_folders(folder)
    if not runs:
        raise ConfigError.of(
            "no run to show",
            where=str(folder),
            why=f"neither it nor a folder in it has an {RunFolder.events}",
            remedy="use a folder that contains a run's events.jsonl, or one with runs in it",
        )
    token = read_token(token_file)
    live = RunState(Redaction.of(os.environ, token), stall_timeout_seconds(folder))
    is_single = list(runs) == ["."]
    server = StatusServer(
        live,
        host=host,
        port=USUAL_PORT if port is None else port,
        token=token,
        allowed_hosts=allowed_hosts,
        folder=folder,
        log=LogFollower(live, RunFolder(folder).log),
        make_site=None if is_single else lambda gauges: _runs_site(folder, live, gauges),
    )
    try:
        server.start()
    except UnavailableError:
        if port is not None:
            raise
        server.port = 0
        server.start()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        if is_single:
            _follow(EventFollower(folder, live), server.url, ended, say)
        else:
            say(f"dashboard of {len(runs)} runs: {server.url}  (stop with Ctrl-C)")
            ended.wait()
    finally:
        server.stop()


def _follow(
    recording: EventFollower, url: str, ended: threading.Event, say: Callable[[str], None]
) -> None:
    """Take up what is recorded until the end."""
    recording.read()
    if (own := own_address(recording.folder)) and not recording.live.is_abandoned:
        say(f"the run has its own server at {own}")
    say(f"dashboard: {url}  (stop with Ctrl-C)")
    while not ended.wait(FOLLOW_SECONDS):
        recording.read()


def _runs_site(folder: Path, live: RunState, gauges: Gauges) -> Site:
    from .outputs import RunsSite

    return RunsSite(folder, live.redaction, gauges)
