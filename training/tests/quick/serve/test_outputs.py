"""A folder of runs over HTTP: the list, the differences, each run's own pages, and the gate."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lora_trainer.redaction import Redaction
from lora_trainer.run_folder import RunFolder
from lora_trainer.serve.outputs import MOST_OPEN, RunsSite
from lora_trainer.serve.run_state import RunState
from lora_trainer.serve.server import StatusServer
from support.recorded_runs import END, hold_by, make_run
from support.run_events import RUN, started, stepped

Get = Callable[..., tuple[int, bytes]]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    (make_run(folder / "good", *RUN, END, learning_rate=1e-4) / RunFolder.done).touch()
    make_run(folder / "bad", started(), stepped(1, loss=float("nan")), learning_rate=1.0)
    make_run(folder / "é %2F?#", *RUN, END)
    make_run(folder, *RUN, END)
    (tmp_path / "outside").mkdir()
    make_run(tmp_path / "outside", *RUN, END)
    return folder


@pytest.fixture
def server(outputs: Path) -> Iterator[StatusServer]:
    live = RunState(Redaction(["canary-77"]))
    one = StatusServer(
        live,
        port=0,
        token="a-long-secret",
        make_site=lambda gauges: RunsSite(outputs, live.redaction, gauges),
    )
    one.start()
    yield one
    one.stop()


@pytest.fixture
def get(server: StatusServer) -> Get:
    def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        given = {"Authorization": "Bearer a-long-secret"} | headers
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as client:
            client.request(method, path, headers=given)
            response = client.getresponse()
            return response.status, response.read()

    return ask


def test_runs_are_listed_with_addresses_that_lead_to_them(get: Get):
    code, body = get("/runs")
    runs = {run["name"]: run for run in json.loads(body)["runs"]}
    assert code == 200
    assert set(runs) == {"good", "bad", "é %2F?#", "outputs"}
    assert runs["bad"]["last_loss"] is None
    for name, run in runs.items():
        status = json.loads(get(f"{run['path']}status")[1])
        assert status["step"] == (1 if name == "bad" else 40)


def test_each_run_has_the_pages_that_it_serves_itself(get: Get):
    for page in ("", "status", "metrics", "history", "log", "static/app.js", "openapi.json"):
        assert get(f"/runs/good/{page}")[0] == 200, page
    assert get("/runs/good/health")[0] == 200
    assert b'id="charts"' in get("/runs/good/")[1]


@pytest.mark.parametrize(
    "path",
    ["/runs/none/status", "/runs/../outside/status", "/runs/..%2Foutside/status", "/runs/good"],
)
def test_what_is_no_run_of_the_folder_is_not_served(get: Get, path):
    assert get(path)[0] == 404


def test_runs_answer_to_get_and_head_from_known_hosts_with_the_token(get: Get):
    assert get("/runs", "HEAD") == (200, b"")
    assert get("/runs", "POST")[0] == 405
    assert get("/runs/good/status", "DELETE")[0] == 405
    assert get("/runs", Host="evil.example")[0] == 421
    assert get("/runs/good/health", Authorization="")[0] == 401
    assert get("/health", Authorization="")[0] == 200


def test_run_that_goes_on_is_followed(get: Get, outputs: Path):
    folder = make_run(outputs / "live", started(), stepped(1))
    hold_by(folder, os.getpid())
    assert json.loads(get("/runs/live/status")[1])["step"] == 1
    with RunFolder(folder).events.open("a") as file:
        file.write(stepped(2).to_line())
    until = time.monotonic() + 20
    while json.loads(get("/runs/live/status")[1])["step"] != 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    runs = json.loads(get("/runs")[1])["runs"]
    assert [run["state"] for run in runs if run["name"] == "live"] == ["running"]


def test_more_runs_than_stay_open_are_all_answered(get: Get, outputs: Path):
    for number in range(MOST_OPEN + 2):
        make_run(outputs / f"run-{number}", *RUN, END)
    for number in (*range(MOST_OPEN + 2), 0):
        assert json.loads(get(f"/runs/run-{number}/status")[1])["step"] == 40


def test_differences_name_keys_and_each_runs_value(get: Get):
    differences = json.loads(get("/differences?run=good&run=bad")[1])
    assert differences["keys"] == {"learning_rate": [1e-4, 1.0]}
    assert get("/differences?run=good&run=none")[0] == 404


def test_secret_in_a_name_is_not_shown(get: Get, outputs: Path):
    make_run(outputs / "canary-77", *RUN, END)
    names = [run["name"] for run in json.loads(get("/runs")[1])["runs"]]
    assert "***" in names
    assert "canary-77" not in names
