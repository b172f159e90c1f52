"""One browser for all tests of the page, and a server for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from browser.page import Page
from lora_trainer.events import Event
from lora_trainer.live import LiveRun
from lora_trainer.server import StatusServer

Serve = Callable[..., StatusServer]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.quit()


@pytest.fixture
def page(browser: Page) -> Page:
    return browser


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a run of these events; `port` takes the place of a server that is gone."""
    started: list[StatusServer] = []

    def start(*events: Event, port: int = 0, token: str = "") -> StatusServer:
        live = LiveRun()
        for event in events:
            live.add(event)
        server = StatusServer(live, port=port, token=token)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()
