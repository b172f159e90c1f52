"""The routes of the status server.

Starlette routes requests to `responses`, behind `auth`. `/events` streams server-sent events: each
stream reads new events from the run's ring buffer, so a slow client blocks nothing and receives
`reset` when it has fallen behind the buffer.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.resources
import importlib.util
import mimetypes
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from . import responses
from .auth import AccessGuard, App
from .gauges import Gauges
from .run_state import RunState, frame, to_json

MOST_STREAMS = 256
MOST_AT_ONCE = 1000  # events that a stream is sent together; a client that missed more starts over
MOST_POINTS = 4096
MOST_LINES = 1000
PULSE_SECONDS = 0.25  # between looks at what is new: many steps make one write
PULSE_STREAMS = 16  # of more streams each is written to less often, so that the cost stays
TICK_SECONDS = 1.0
SILENT_PULSES = 60  # without anything to say: a comment keeps proxies from closing
PAGE = "index.html"
# The charts are drawn by a library that stays in its installed package, which is never imported.
LIBRARY = "bokeh"
LIBRARY_FILES = ("server/static/js/bokeh.min.js", "server/static/js/bokeh-api.min.js")


@dataclass
class Broadcaster:
    """Wakes all streams together, and makes what is the same for all of them once."""

    live: RunState
    gauges: Gauges
    streams: int = 0
    tick: int = 0
    tick_frame: bytes = b""
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    on_pulse: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Beat until cancelled."""
        waited = 0.0
        while True:
            crowd = max(1.0, self.streams / PULSE_STREAMS)
            pause = min(PULSE_SECONDS * crowd, TICK_SECONDS)
            await asyncio.sleep(pause)
            if not self.streams:
                continue
            self.on_pulse()
            waited += pause
            if waited >= TICK_SECONDS:
                waited = 0.0
                self.tick += 1
                self.tick_frame = frame("tick", responses.tick_view(self.live, self.gauges))
            self.woken.set()
            self.woken = asyncio.Event()

    async def stream(self, sequence: int | None) -> AsyncIterator[bytes]:
        """Yield what happens after an event, forever; None: from now on."""
        live = self.live
        had = live.sequence if sequence is None else sequence
        _, log_had = live.log_after(live.log_lines_seen)
        tick_had, silent = -1, 0
        yield b"retry: 2000\n\n"
        while True:
            frames_due: list[bytes] = []
            frames, is_whole = live.frames_after(had)
            if not is_whole or len(frames) > MOST_AT_ONCE:
                had = live.sequence
                frames_due.append(frame("reset", {}, f"{live.boot}.{had}"))
            elif frames:
                had = frames[-1].sequence
                frames_due += [one.data for one in frames]
            lines, log_had = live.log_after(log_had)
            if lines:
                frames_due.append(frame("log", {"lines": lines}))
            if self.tick != tick_had and self.tick_frame:
                tick_had = self.tick
                frames_due.append(self.tick_frame)
            silent = 0 if frames_due else silent + 1
            if silent >= SILENT_PULSES:
                silent = 0
                frames_due.append(b": still here\n\n")
            if frames_due:
                yield b"".join(frames_due)
            await self.woken.wait()


class Pages:
    """Answers for one run."""

    def __init__(self, live: RunState, gauges: Gauges, read_log: Callable[[], None]) -> None:
        self.live = live
        self.gauges = gauges
        self.pulse = Broadcaster(live, gauges, on_pulse=read_log)
        self._read_log = read_log
        self._series: tuple[tuple[int, int, float], bytes] = ((-1, -1, 0.0), b"")

    def routes(self) -> list[Route]:
        """Return what is served where."""
        return [
            *Files().routes(),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/status", self.status),
            Route("/history", self.history),
            Route("/log", self.log),
            Route("/events", self.events),
            Route("/openapi.json", self.openapi),
        ]

    async def health(self, _request: Request) -> Response:
        """Return whether the run is well."""
        view = responses.health_view(self.live, self.gauges)
        return answer(view, 200 if view["status"] == "healthy" else 503)

    async def metrics(self, request: Request) -> Response:
        """Return the figures of the moment, in the format that is asked for."""
        from . import prometheus  # 0.1 s that the first answer need not wait for

        kind = prometheus.negotiate(",".join(request.headers.getlist("accept")))
        if kind == prometheus.JSON_TYPE:
            response = answer(responses.metrics_view(self.live, self.gauges))
        else:
            exposed = prometheus.expose(self.live, self.gauges, kind)
            response = Response(exposed, headers={"content-type": kind})
        response.headers["vary"] = "Accept"
        return response

    async def status(self, _request: Request) -> Response:
        """Return all that is known."""
        return answer(responses.status_view(self.live, self.gauges))

    async def history(self, request: Request) -> Response:
        """Return the series; computed once for all who ask while nothing happens."""
        wanted = _whole(request, "max_points", 500, MOST_POINTS)
        reading = self.gauges.latest
        key = (self.live.sequence, wanted, reading.time if reading else 0.0)
        if self._series[0] != key:
            series = await run_in_threadpool(
                lambda: to_json(responses.history_view(self.live, self.gauges, wanted)).encode()
            )
            self._series = (key, series)
        return Response(self._series[1], media_type="application/json")

    async def log(self, request: Request) -> Response:
        """Return the log's last lines."""
        wanted = _whole(request, "lines", 200, MOST_LINES)
        self._read_log()
        return answer({"lines": list(self.live.log)[-wanted:]})

    async def events(self, request: Request) -> Response:
        """Stream what happens."""
        headers = {"X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        if self.pulse.streams >= MOST_STREAMS:
            raise HTTPException(503, "too many streams are open", {"Retry-After": "5"})
        sequence = self._sequence(request.headers.get("last-event-id", ""))
        return StreamingResponse(
            self._counted(sequence), media_type="text/event-stream", headers=headers
        )

    async def _counted(self, sequence: int | None) -> AsyncIterator[bytes]:
        self.pulse.streams += 1
        try:
            async for part in self.pulse.stream(sequence):
                yield part
        finally:
            self.pulse.streams -= 1

    def _sequence(self, given: str) -> int | None:
        boot, _, number = given.partition(".")
        if not given:
            return None
        if boot != self.live.boot or not (number.isascii() and number.isdigit()):
            return -1  # of another server: begin with a reset
        return int(number[:18])

    async def openapi(self, _request: Request) -> Response:
        """Return the document that describes all of this."""
        return answer(openapi_document())

    async def run(self) -> None:
        """Wake the streams until cancelled."""
        await self.pulse.run()


class Files:
    """The page and what it loads, known by name: no path is ever made from a request."""

    def __init__(self, page: str = PAGE) -> None:
        self._page = page
        self._files = static_files()

    def routes(self) -> list[Route]:
        """Return what is served where."""
        return [Route("/", self.page), Route("/static/{file}", self.static)]

    async def page(self, request: Request) -> Response:
        """Return the page."""
        if "token" in request.query_params:  # it has done its work: out of the address line
            return RedirectResponse(request.url.path, 303)
        return self._file(self._page)

    async def static(self, request: Request) -> Response:
        """Return a file of the page, known by its name alone.

        Not again to who has it: the chart library alone is over a megabyte.
        """
        response = self._file(request.path_params["file"])
        tag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
        if tag in request.headers.get("if-none-match", ""):
            response = Response(status_code=304)
        response.headers.update({"etag": tag, "cache-control": "private, no-cache"})
        return response

    def _file(self, name: str) -> Response:
        file = self._files.get(name)
        if file is None:
            raise HTTPException(404, "not found")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(file(), media_type=kind)


@functools.cache
def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of a run's server."""
    return read_document("openapi.yaml")


def read_document(name: str) -> dict[str, Any]:
    """Return a YAML file of this package."""
    import yaml

    text = (importlib.resources.files(__package__ or "") / name).read_text("utf-8")
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def static_files() -> dict[str, Callable[[], bytes]]:
    """Return the dashboard's files by name; no path is ever made from a request."""
    folder = importlib.resources.files(__package__ or "") / "dashboard"
    entries = folder.iterdir() if folder.is_dir() else ()
    own = {entry.name: entry.read_bytes for entry in entries if entry.is_file()}
    return own | {path.name: path.read_bytes for path in library_files()}


def library_files() -> list[Path]:
    """Return the chart library's files; none where it is not installed, which the page tells."""
    spec = importlib.util.find_spec(LIBRARY)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder, name) for folder in folders or () for name in LIBRARY_FILES]
    return [path for path in files if path.is_file()]


class Site(Protocol):
    """What a server serves."""

    def routes(self) -> Sequence[BaseRoute]:
        """Return what is served where."""

    async def run(self) -> None:
        """Keep it up to date until cancelled."""


def make_app(site: Site, *, names: list[str], token: str, port: int) -> App:
    """Return the application, with its gate."""

    async def on_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        view = {"error": error.detail}
        return answer(view, error.status_code, dict(error.headers or {}))

    app = Starlette(routes=list(site.routes()), exception_handlers={HTTPException: on_error})
    app.router.redirect_slashes = False
    return AccessGuard(app, names=names, token=token, port=port)


def answer(view: Any, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON."""
    return Response(to_json(view), code, headers, "application/json")


def _whole(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and int(text[:9]) >= 1 and len(text) <= 9):
        raise HTTPException(400, f"{name} must be a whole number from 1 to {most}")
    return min(int(text), most)
