"""A folder of runs over HTTP: the list of them, their differences, and each run's own pages.

Runs are read from their folders and found by the names of a listing: no path is ever made from
a request. A run is opened when it is first asked for and followed while it is written; of many,
those that were asked for least recently are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, Router

from ..redaction import Redaction
from ..report.comparison import differing_keys, notes, read_facts
from ..report.tensorboard import tensorboard_command
from ..run.summary import RunSummary, run_folders, summarize
from ..run_folder import RunFolder
from .app import Files, Pages, answer, openapi_document, read_document
from .auth import Receive, Scope, Send
from .follower import FOLLOW_SECONDS, EventFollower, stall_timeout_seconds
from .gauges import Gauges
from .run_state import RunState
from .server import LogFollower

PAGE = "runs.html"
MOST_OPEN = 8
LISTED_SECONDS = 2.0  # a listing is good for so long, whoever asks
ITSELF = "@"  # the address of a run in the folder itself: browsers take `.` out of a path


@dataclass
class OpenRun:
    """A run that is being followed, and what answers for it."""

    follower: EventFollower
    pages: Pages
    router: Router
    pulse: asyncio.Task[None]
    asked: float


class RunsSite:
    """Answers for a folder of runs."""

    def __init__(self, folder: Path, redaction: Redaction, gauges: Gauges) -> None:
        self._folder = folder
        self._redaction = redaction
        self._gauges = gauges
        self._open: dict[str, OpenRun] = {}
        self._opening = asyncio.Lock()
        self._known: dict[str, tuple[tuple[int, ...], RunSummary]] = {}
        self._listed: tuple[float, dict[str, Any]] = (-LISTED_SECONDS, {})

    def routes(self) -> Sequence[BaseRoute]:
        """Return what is served where."""
        return [
            *Files(PAGE).routes(),
            Route("/health", self.health),
            Route("/runs", self.runs),
            Route("/differences", self.differences),
            Route("/openapi.json", self.openapi),
            Mount("/runs/{name}", app=self.one),
        ]

    async def run(self) -> None:
        """Follow the open runs until cancelled."""
        try:
            while True:
                await asyncio.sleep(FOLLOW_SECONDS)
                for one in list(self._open.values()):
                    await run_in_threadpool(one.follower.read)
        finally:
            for one in self._open.values():
                one.pulse.cancel()

    async def health(self, _request: Request) -> Response:
        """Tell that the server is well; each run has its own answer."""
        return answer({"status": "healthy", "runs": len(await self._folders())})

    async def runs(self, _request: Request) -> Response:
        """Return the runs with their figures, the one that was started last first."""
        listed, view = self._listed
        if time.monotonic() - listed >= LISTED_SECONDS:
            view = await run_in_threadpool(self.listing)
            self._listed = (time.monotonic(), view)
        return answer(view)

    async def differences(self, request: Request) -> Response:
        """Return the keys in which the named runs differ, and what makes comparing unfair."""
        folders = await self._folders()
        names = request.query_params.getlist("run")
        if unknown := [name for name in names if name not in folders]:
            raise HTTPException(404, f"there is no run {unknown[0]}")
        chosen = [await run_in_threadpool(read_facts, folders[name]) for name in names]
        keys = differing_keys([facts.config for facts in chosen])
        return answer({"keys": keys, "notes": notes(chosen)})

    async def openapi(self, _request: Request) -> Response:
        """Return the document that describes all of this."""
        return answer(runs_document())

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the pages of the run that it names."""
        opened = await self._opened(scope["path_params"]["name"])
        opened.asked = time.monotonic()
        await opened.router(scope, receive, send)

    async def _opened(self, name: str) -> OpenRun:
        async with self._opening:
            folder = (await self._folders()).get(name)
            if folder is None:
                raise HTTPException(404, "there is no such run")
            if name not in self._open:
                self._close_idle()
                self._open[name] = await self._follow(folder)
            return self._open[name]

    async def _follow(self, folder: Path) -> OpenRun:
        live = RunState(self._redaction, stall_timeout_seconds(folder))
        live.free_disk_bytes = lambda: self._gauges.free_disk_bytes
        follower = EventFollower(folder, live)
        await run_in_threadpool(follower.read)
        pages = Pages(live, self._gauges, LogFollower(live, RunFolder(folder).log).read)
        router = Router(routes=pages.routes(), redirect_slashes=False)
        pulse = asyncio.create_task(pages.run())
        return OpenRun(follower, pages, router, pulse, time.monotonic())

    def _close_idle(self) -> None:
        """Make room for another run; those that somebody is streaming stay open."""
        idle = [name for name, one in self._open.items() if not one.pages.pulse.streams]
        idle.sort(key=lambda name: self._open[name].asked)
        for name in idle[: max(0, len(self._open) - MOST_OPEN + 1)]:
            self._open.pop(name).pulse.cancel()

    async def _folders(self) -> dict[str, Path]:
        return await run_in_threadpool(addresses, self._folder)

    def listing(self) -> dict[str, Any]:
        """Return the answer of `/runs`."""
        runs = [
            self._summary(address, folder) | {"address": address}
            for address, folder in addresses(self._folder).items()
        ]
        runs.sort(key=lambda run: run["started_time"] or 0.0, reverse=True)
        for run in runs:
            run["path"] = f"/runs/{quote(run['address'], safe='', errors='replace')}/"
        return {
            "folder": str(self._folder),
            "runs": runs,
            "tensorboard": next(iter(tensorboard_command(self._folder)), ""),
        }

    def _summary(self, address: str, folder: Path) -> dict[str, Any]:
        """Return a run's summary; one that is over is not read again until its files change."""
        changed = _changed(folder)
        known = self._known.get(address)
        if known is None or known[0] != changed or known[1].state == "running":
            name = self._redaction.text(folder.name)
            self._known[address] = known = (changed, summarize(name, folder))
        return known[1].to_json()


@functools.cache
def runs_document() -> dict[str, Any]:
    """Return the OpenAPI document of the page of several runs: its own paths, and each run's."""
    run, site = openapi_document(), read_document("openapi_runs.yaml")
    shared = {path: run["paths"][path] for path in ("/", "/static/{file}", "/openapi.json")}
    for item in site["paths"].values():
        item["head"] = shared["/"]["head"]
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    missing = {"$ref": "#/components/responses/Error"}
    for path, item in run["paths"].items():
        get = item["get"]
        site["paths"][f"/runs/{{name}}{path}"] = item | {
            "parameters": [name, *item.get("parameters", [])],
            "get": get
            | {
                "operationId": f"run_{get['operationId']}",
                "responses": get["responses"] | {"404": missing},
            },
        }
    schemas = run["components"]["schemas"] | site["components"]["schemas"]
    return run | {
        "info": run["info"] | site["info"],
        "paths": shared | site["paths"],
        "components": run["components"] | {"schemas": schemas},
    }


def addresses(parent: Path) -> dict[str, Path]:
    """Return the runs in a folder by the names in their addresses."""
    runs = run_folders(parent)
    own = runs.pop(".", None)
    return runs if own is None else {ITSELF: own} | runs


def _changed(folder: Path) -> tuple[int, ...]:
    stamps: list[int] = []
    for name in (RunFolder.events, RunFolder.results, RunFolder.done):
        with contextlib.suppress(OSError):
            info = (folder / name).stat()
            stamps += (info.st_mtime_ns, info.st_size, info.st_ino)
    return tuple(stamps)
