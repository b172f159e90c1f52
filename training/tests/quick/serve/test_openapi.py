"""Every answer is as the published document says, for whatever is asked, and no path is missing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from starlette.routing import BaseRoute, Mount, Route

from lora_trainer.redaction import Redaction
from lora_trainer.serve import responses
from lora_trainer.serve.app import Pages, make_app, openapi_document
from lora_trainer.serve.outputs import RunsSite, runs_document
from lora_trainer.serve.run_state import RunState
from support.live_runs import full_run, gauges_of
from support.recorded_runs import END, make_run
from support.run_events import RUN

HOST = {"host": "localhost"}


def app_of(live: RunState):
    pages = Pages(live, gauges_of(), lambda: None)
    return make_app(pages, names=["localhost"], token="", port=1)


# The stream never ends: its own tests read it. Both states of a run must fit the document.
APPS = {name: app_of(live) for name, live in
        {"empty": RunState(Redaction()), "full": full_run()}.items()}  # fmt: skip
schema = schemathesis.openapi.from_dict(openapi_document()).exclude(path="/events")
OUTPUTS = Path(tempfile.mkdtemp())
for name in ("one", "other"):
    make_run(OUTPUTS / name, *RUN, END, eval_fraction=0.1)
SITE = RunsSite(OUTPUTS, Redaction(), gauges_of())
SITE_APP = make_app(SITE, names=["localhost"], token="", port=1)
runs_schema = schemathesis.openapi.from_dict(runs_document()).exclude(path_regex="/runs/{name}/")


@pytest.mark.parametrize("state", APPS)
@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_the_document_says(case, state):
    # /health answers 503 on purpose; a status that is not in the document still fails.
    case.call_and_validate(
        app=APPS[state], headers=HOST, excluded_checks=[schemathesis.checks.not_a_server_error]
    )


@pytest.mark.parametrize("name", ["health", "metrics", "status"])
def test_document_names_every_key_of_an_answer(name):
    known = openapi_document()["components"]["schemas"][name.capitalize()]["properties"]
    view = getattr(responses, f"{name}_view")(full_run(), gauges_of())
    assert view.keys() == known.keys()


@runs_schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_about_several_runs_are_as_the_document_says(case):
    case.call_and_validate(app=SITE_APP, headers=HOST)


def paths_of(routes: Sequence[BaseRoute], start: str = "") -> Iterator[str]:
    """Yield the paths of routes; a run in a folder of runs serves all the paths of one run."""
    for route in routes:
        if isinstance(route, Mount):
            pages = Pages(full_run(), gauges_of(), lambda: None)
            yield from paths_of(pages.routes(), route.path)
        else:
            assert isinstance(route, Route)
            yield start + route.path


@pytest.mark.parametrize(
    ("site", "document"),
    [
        (Pages(full_run(), gauges_of(), lambda: None), openapi_document()),
        (SITE, runs_document()),
    ],
    ids=["one run", "several runs"],
)
def test_document_names_every_path_that_is_served_and_no_other(site, document):
    assert set(document["paths"]) == set(paths_of(site.routes()))


def test_list_of_runs_names_every_key_of_a_run():
    known = runs_document()["components"]["schemas"]["Run"]["properties"]
    (run, _) = SITE.listing()["runs"]
    assert run.keys() == known.keys()
