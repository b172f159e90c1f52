"""One browser for all tests of the page, and a server for each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest

from lora_trainer.redaction import Redaction
from lora_trainer.run.events import Event, StepDone
from lora_trainer.run.status import RECENT_STEPS
from lora_trainer.serve.run_state import RunState
from lora_trainer.serve.server import StatusServer
from support.page import Page

Serve = Callable[..., StatusServer]
MANY = 1000


def live_after(events: Sequence[Event]) -> RunState:
    """Return a run after these events; of very many, the status is that of the newest."""
    live = RunState(Redaction.of({}))
    steps = [event for event in events if isinstance(event, StepDone)]
    left_out = {step.step for step in steps[: -2 * RECENT_STEPS]} if len(steps) > MANY else ()
    for event in events:
        if isinstance(event, StepDone) and event.step in left_out:
            live.history.add(event)
        else:
            live.add(event)
    return live


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium here (apt-get install chromium chromium-driver)")
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
        server = StatusServer(live_after(events), port=port, token=token)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()
