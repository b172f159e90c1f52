"""The status server over real sockets: what it answers, streams and says when it cannot."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_trainer.errors import ConfigError, UnavailableError
from lora_trainer.redaction import Redaction
from lora_trainer.run.events import Failed, Warned
from lora_trainer.serve import limits, run_state, server
from lora_trainer.serve.run_state import RunState
from lora_trainer.serve.server import LogFollower, StatusServer, read_token
from support.live_runs import full_run, live_run
from support.run_events import PLAN, RUN, START, stepped
from support.talking import Stream, ask, connected, is_closed

Serve = Callable[..., StatusServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that serves a run on a free port."""
    started: list[StatusServer] = []

    def begin(run: RunState, **options) -> StatusServer:
        one = StatusServer(run, port=0, **options)
        one.start()
        started.append(one)
        return one

    yield begin
    for one in started:
        one.stop()


def test_answers_before_anything_is_known_of_the_run(serve: Serve):
    answer = ask(serve(live_run()), "/health")
    assert answer.code == 200
    health = answer.json()
    assert (health["status"], health["phase"], health["is_training"]) == (
        "healthy",
        "starting",
        False,
    )
    assert isinstance(health["cuda_available"], bool)


def test_run_that_failed_is_unhealthy_with_reason_and_remedy(serve: Serve):
    failed = Failed(exit_code=65, problems=[{"what": "row 3 is empty", "remedy": "mend row 3"}])
    answer = ask(serve(live_run(START, failed)), "/health")
    assert answer.code == 503
    assert "row 3 is empty" in answer.json()["reason"]
    assert answer.json()["remedy"] == "mend row 3"


def test_figures_and_status_are_those_of_the_run(serve: Serve):
    one = serve(live_run(*RUN))
    metrics, status = ask(one, "/metrics").json(), ask(one, "/status").json()
    assert (metrics["current_step"], metrics["total_steps"], metrics["last_loss"]) == (40, 40, 1.0)
    assert (status["is_running"], status["phase"]) == (False, "finished")
    assert status["evals"][-1]["eval_loss"] == 0.25


def test_loss_that_is_not_finite_is_null_in_valid_json(serve: Serve):
    metrics = ask(serve(live_run(START, PLAN, stepped(1, loss=float("inf")))), "/metrics").json()
    assert metrics["last_loss"] is None
    assert metrics["is_loss_finite"] is False


def test_history_has_columns_of_one_length_and_no_more_points_than_asked(serve: Serve):
    one = serve(live_run(START, *(stepped(step) for step in range(1, 3001))))
    points = ask(one, "/history?max_points=50").json()["points"]
    assert {len(column) for column in points.values()} == {50}
    assert points["step"][-1] == 3000
    assert len(ask(one, "/history").json()["points"]["step"]) == 500


def test_history_of_the_machine_goes_on_while_the_run_is_silent(serve: Serve):
    one = serve(live_run(START))
    until = time.monotonic() + 60
    lengths = set()
    while len(lengths) < 2 and time.monotonic() < until:
        lengths.add(len(ask(one, "/history").json()["hardware"]["time"]))
        time.sleep(0.1)
    assert len(lengths) >= 2


@pytest.mark.parametrize("query", ["max_points=0", "max_points=x", "max_points=-1", "max_points="])
def test_senseless_number_of_points_is_refused(serve: Serve, query):
    assert ask(serve(live_run()), f"/history?{query}").code == 400


def test_metrics_come_in_the_format_that_accept_asks_for(serve: Serve):
    one = serve(live_run(*RUN))
    text = ask(one, "/metrics", accept="text/plain;version=0.0.4")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"lora_trainer_loss 1.0\n" in text.body
    assert ask(one, "/metrics", accept="application/openmetrics-text").body.endswith(b"# EOF\n")


def test_log_is_its_newest_lines_without_secrets(serve: Serve, tmp_path: Path):
    path = tmp_path / "train.log"
    path.write_text("".join(f"line {n} canary-9\n" for n in range(500)) + "not yet whole")
    run = RunState(Redaction(["canary-9"]))
    one = serve(run, log=LogFollower(run, path))
    lines = ask(one, "/log?lines=2").json()["lines"]
    assert lines == ["line 498 ***", "line 499 ***"]
    with path.open("a") as file:
        file.write(" but now\n")
    assert ask(one, "/log?lines=1").json()["lines"] == ["not yet whole but now"]


def test_stream_tells_each_event_once_and_a_tick(serve: Serve):
    run = live_run(START)
    with Stream(serve(run)) as stream:
        assert stream.next("tick")[2]["health"]["status"] == "healthy"
        run.add(stepped(1))
        run.add(stepped(2, loss=float("nan")))
        kinds = [stream.next("step"), stream.next("step")]
    assert [data["step"] for _, _, data in kinds] == [1, 2]
    assert kinds[1][2]["loss"] is None
    assert len({identity for _, identity, _ in kinds}) == 2


def test_stream_goes_on_where_it_was_broken_off(serve: Serve):
    run = live_run(START)
    one = serve(run)
    with Stream(one) as stream:
        stream.next("tick")
        run.add(stepped(1))
        _, last, _ = stream.next("step")
    run.add(stepped(2))
    run.add(stepped(3))
    with Stream(one, last) as stream:
        assert [stream.next("step", "reset")[2]["step"] for _ in range(2)] == [2, 3]


@pytest.mark.parametrize("last", ["other.3", "nonsense", "1", "."])
def test_stream_of_another_server_begins_with_a_reset(serve: Serve, last):
    with Stream(serve(live_run(START)), last) as stream:
        assert stream.next()[0] == "reset"


def test_who_missed_more_than_is_kept_is_told_so(serve: Serve, monkeypatch):
    monkeypatch.setattr(run_state, "KEPT_FRAMES", 4)
    run = live_run(START)
    one = serve(run)
    with Stream(one) as stream:
        stream.next("tick")
        run.add(stepped(1))
        _, last, _ = stream.next("step")
    for step in range(2, 8):
        run.add(stepped(step))
    with Stream(one, last) as stream:
        assert stream.next("step", "reset")[0] == "reset"
        run.add(stepped(8))
        assert stream.next("step")[2]["step"] == 8


def test_stream_tells_new_lines_of_the_log(serve: Serve, tmp_path: Path):
    path = tmp_path / "train.log"
    path.write_text("old\n")
    run = live_run(START)
    with Stream(serve(run, log=LogFollower(run, path))) as stream:
        stream.next("tick")
        with path.open("a") as file:
            file.write("new\n")
        lines = []
        while "new" not in lines:
            lines += stream.next("log")[2]["lines"]


def test_client_that_reads_nothing_holds_nobody_back_and_is_let_go(serve: Serve, monkeypatch):
    monkeypatch.setattr(limits, "UNREAD_SECONDS", 1.0)
    run = live_run(START)
    one = serve(run)
    with socket.socket() as lazy, Stream(one) as stream:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", one.port))
        lazy.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stream.next("tick")
        slowest, until = 0.0, time.monotonic() + 60
        while len(one._server.server_state.connections) == 2 and time.monotonic() < until:
            for number in range(100):
                begin = time.perf_counter()
                run.add(Warned(message=f"{number} " + "x" * 2000))
                slowest = max(slowest, time.perf_counter() - begin)
            run.add(stepped(1))
            assert stream.next("step")
        assert slowest < 1  # a pause of the machine, never the client's patience
        assert len(one._server.server_state.connections) == 1


def test_too_many_streams_are_refused_and_the_rest_goes_on(serve: Serve, monkeypatch):
    from lora_trainer.serve import app

    monkeypatch.setattr(app, "MOST_STREAMS", 1)
    one = serve(live_run(START))
    with Stream(one) as first:
        first.next("tick")
        with Stream(one) as second:
            assert second.code == 503
        assert ask(one, "/health").code == 200


def test_head_has_the_headers_of_get_and_no_body(serve: Serve):
    one = serve(full_run())
    for path in ("/health", "/metrics", "/status", "/history", "/log", "/events", "/openapi.json"):
        answer = ask(one, path, "HEAD")
        assert answer.code == (503 if path == "/health" else 200)
        assert answer.body == b""


def test_stop_ends_open_streams_and_frees_the_port(serve: Serve):
    one = serve(live_run(START))
    with Stream(one) as stream, connected(one) as idle:
        stream.next("tick")
        begin = time.monotonic()
        one.stop()
        assert time.monotonic() - begin < 10
        assert is_closed(idle)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", one.port))


def test_server_ends_with_its_process_whoever_is_connected(serve: Serve):
    one = serve(live_run(START))
    assert one._thread.daemon
    assert threading.current_thread() is not one._thread


def test_server_that_cannot_run_says_so_and_leaves_the_port(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    faults: list[str] = []
    one = StatusServer(live_run(), port=0, on_fault=faults.append)
    one.start()
    one._thread.join(30)
    assert "uvicorn" in faults[0]
    with pytest.raises(ConnectionError):
        ask(one, "/health")
    one.stop()


def test_port_that_is_taken_is_told_with_its_owner(serve: Serve):
    taken = serve(live_run())
    begin = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        StatusServer(live_run(), port=taken.port).start()
    assert time.monotonic() - begin < 2
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 69
    assert str(taken.port) in problem.where
    assert f"pid {os.getpid()}" in problem.why
    assert "--health_port 0" in problem.remedy


def test_address_that_is_not_this_machines_is_a_configuration_error():
    with pytest.raises(ConfigError, match="cannot start"):
        StatusServer(live_run(), host="192.0.2.1", port=0).start()
    with pytest.raises(ConfigError, match="does not belong to this machine"):
        StatusServer(live_run(), host="no such host", port=0).start()


def test_address_for_browsers_is_one_that_they_can_reach(serve: Serve):
    one = serve(live_run(), host="0.0.0.0")
    assert one.url == f"http://127.0.0.1:{one.port}"
    assert ask(one, "/health").code == 200


def test_ipv6_address_is_served(serve: Serve):
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    assert serve(live_run(), host="::1").url.startswith("http://[::1]:")


@pytest.mark.parametrize("content", ["", "short", "two words here", "naïve-token-naïve"])
def test_token_that_is_none_is_refused_with_a_command_that_makes_one(tmp_path: Path, content):
    (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_token(str(tmp_path / "token"))
    assert "openssl rand" in caught.value.problems[0].remedy
    with pytest.raises(ConfigError, match="cannot be used"):
        read_token(str(tmp_path / "missing"))


def test_owner_that_cannot_be_known_is_described(monkeypatch):
    def refuse(_kind):
        raise server.psutil.AccessDenied

    monkeypatch.setattr(server.psutil, "net_connections", refuse)
    assert "another user" in server.owner_of(80)
