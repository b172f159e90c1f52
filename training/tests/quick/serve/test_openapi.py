"""Every answer is as the published document says, for whatever is asked."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from lora_trainer.redaction import Redaction
from lora_trainer.serve import responses
from lora_trainer.serve.app import Pages, make_app, openapi_document
from lora_trainer.serve.run_state import RunState
from support.live_runs import full_run, gauges_of

HOST = {"host": "localhost"}


def app_of(live: RunState):
    pages = Pages(live, gauges_of(), lambda: None)
    return make_app(pages, names=["localhost"], token="", port=1)


# The stream never ends: its own tests read it. Both states of a run must fit the document.
APPS = {name: app_of(live) for name, live in
        {"empty": RunState(Redaction()), "full": full_run()}.items()}  # fmt: skip
schema = schemathesis.openapi.from_dict(openapi_document()).exclude(path="/events")


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
