"""Who may not ask, and what may not be asked: refused or bounded, and nothing leaks."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from lora_trainer.serve import limits
from lora_trainer.serve.auth import host_name
from lora_trainer.serve.server import StatusServer
from support.live_runs import full_run
from support.talking import Answer, ask, connected, is_closed, say

TOKEN = "a-token-of-some-length"
PATHS = ("/", "/health", "/metrics", "/status", "/history", "/log", "/events", "/openapi.json")


@pytest.fixture(scope="module")
def plain() -> Iterator[StatusServer]:
    one = StatusServer(full_run(), port=0, allowed_hosts=["studio.example"])
    one.start()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def guarded() -> Iterator[StatusServer]:
    one = StatusServer(full_run(), port=0, token=TOKEN)
    one.start()
    yield one
    one.stop()


@pytest.fixture
def fresh() -> Iterator[StatusServer]:
    """Return a server that is not started yet, so that its bounds can be changed."""
    one = StatusServer(full_run(), port=0)
    yield one
    one.stop()


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "10.0.0.1", "::1",
     "localhost@evil.example", "[::1", "localhost:x", "localhost:80:80", "", " ", "0x7f.1"],
)  # fmt: skip
def test_foreign_host_is_refused(plain: StatusServer, host):
    for path in PATHS:
        answer = ask(plain, path, host=host)
        assert answer.code in (400, 421), path
        assert b"demo" not in answer.body


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "localhost.", "studio.example",
     socket.gethostname()],
)  # fmt: skip
def test_own_names_are_known_with_any_port(plain: StatusServer, host):
    assert ask(plain, "/metrics", host=host).code == 200


def test_request_without_a_host_is_refused(plain: StatusServer):
    assert b" 421 " in say(plain, b"GET /health HTTP/1.0\r\n\r\n").splitlines()[0]
    assert b" 400 " in say(plain, b"GET /health HTTP/1.1\r\n\r\n").splitlines()[0]


def test_two_hosts_are_refused(plain: StatusServer):
    data = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert b" 400 " in say(plain, data).splitlines()[0]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get"])
def test_other_methods_are_refused_everywhere(plain: StatusServer, method):
    for path in (*PATHS, "/nowhere"):
        answer = ask(plain, path, method)
        assert answer.code == 405
        assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path",
    ["/static/../server.py", "/static/%2e%2e%2fserver.py", "/static/..%2f..%2fcli.py", "//health",
     "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/index.html%00", "/health/",
     "/static/", "/static", "/..", "/%2e%2e/", "/status/../health", "/static/..\\server.py",
     "/%ff%fe", "/health%0d%0aX-Injected:1", "/.env", "/train.log", "/events.jsonl"],
)  # fmt: skip
def test_path_tricks_lead_nowhere(plain: StatusServer, path):
    answer = ask(plain, path)
    assert answer.code == 404
    assert "x-injected" not in answer.headers
    assert b"root:" not in answer.body
    assert b"import" not in answer.body


def test_every_answer_carries_the_security_headers(plain: StatusServer):
    answers: list[Answer] = [ask(plain, path, "HEAD") for path in PATHS]
    answers += [ask(plain, "/nowhere"), ask(plain, "/", "POST"), ask(plain, "/", host="evil.x")]
    for one in answers:
        assert "default-src 'self'" in one.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in one.headers["content-security-policy"]
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["referrer-policy"] == "no-referrer"
        assert one.headers["cache-control"] == "no-store"
        assert "server" not in one.headers
        assert not [name for name in one.headers if name.startswith("access-control")]


def test_file_of_the_page_is_sent_once_to_who_keeps_it(plain: StatusServer):
    first = ask(plain, "/static/app.js")
    assert (first.code, first.headers["cache-control"]) == (200, "private, no-cache")
    again = ask(plain, "/static/app.js", **{"If-None-Match": first.headers["etag"]})
    assert (again.code, again.body) == (304, b"")
    other = ask(plain, "/static/style.css", **{"If-None-Match": first.headers["etag"]})
    assert other.code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000,
        b"\x16\x03\x01\x02\x00 no http at all\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
    ],
)
def test_giant_or_malformed_heads_are_refused(plain: StatusServer, data, capfd):
    received = say(plain, data)
    first = received.splitlines()[0] if received else b"closed 400"
    assert b" 4" in first or b" 5" in first
    assert b"Traceback" not in received
    assert ask(plain, "/log").code == 200
    assert capfd.readouterr() == ("", "")  # nor does nonsense reach the terminal


def test_body_that_nobody_wants_is_not_read_without_end(fresh: StatusServer, monkeypatch):
    monkeypatch.setattr(limits, "REQUEST_SECONDS", 1.0)
    fresh.start()
    with connected(fresh) as client:
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
        client.sendall(head)
        client.settimeout(1)
        until = time.monotonic() + 30
        with pytest.raises(OSError):
            while time.monotonic() < until:
                client.sendall(b"x" * 1024)
                time.sleep(0.05)
    assert ask(fresh, "/metrics").code == 200


def test_head_that_comes_by_drops_is_given_up(fresh: StatusServer, monkeypatch):
    monkeypatch.setattr(limits, "REQUEST_SECONDS", 1.0)
    fresh.start()
    assert ask(fresh, "/metrics").code == 200  # it is there
    with connected(fresh) as client:
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin < 30:
                client.sendall(b"X")
                time.sleep(0.05)
        assert time.monotonic() - begin < 20


def test_connection_that_says_nothing_is_closed(fresh: StatusServer, monkeypatch):
    monkeypatch.setattr(limits, "REQUEST_SECONDS", 0.5)
    fresh.start()
    with connected(fresh) as client:
        assert is_closed(client)


def test_full_house_makes_room_for_who_really_asks(fresh: StatusServer, monkeypatch):
    monkeypatch.setattr(limits, "MOST_CONNECTIONS", 8)
    fresh.start()
    crowd = [socket.create_connection(("127.0.0.1", fresh.port)) for _ in range(30)]
    try:
        for client in crowd:
            client.sendall(b"GET /health HTTP/1.1\r\n")  # and no more
        assert [ask(fresh, "/metrics").code for _ in range(5)] == [200] * 5
        assert len(fresh._server.server_state.connections) <= 8
    finally:
        for client in crowd:
            client.close()


def test_token_guards_all_but_health(guarded: StatusServer):
    for path in (*PATHS, "/static/app.js", "/nowhere"):
        answer = ask(guarded, path)
        if path == "/health":
            assert answer.code == 503  # as the run is
        else:
            assert answer.code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"bearer {TOKEN}"])
def test_right_token_is_let_in(guarded: StatusServer, given):
    assert ask(guarded, "/status", authorization=given).code == 200


@pytest.mark.parametrize(
    "given", ["Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN} x", "Bearer \xe9"]
)
def test_wrong_token_is_not(guarded: StatusServer, given):
    assert ask(guarded, "/status", authorization=given).code == 401


def test_token_in_the_address_is_exchanged_once_for_a_cookie(guarded: StatusServer):
    answer = ask(guarded, f"/?token={TOKEN}")
    assert (answer.code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    pair = cookie.partition(";")[0]
    assert pair.startswith(f"lora_trainer_{guarded.port}=")
    assert ask(guarded, "/status", cookie=f"other=1; {pair}").code == 200
    assert ask(guarded, "/status", cookie=pair[:-1] + "x").code == 401
    assert ask(guarded, "/status", cookie=f"lora_trainer_{guarded.port}={TOKEN}").code == 401


@pytest.mark.parametrize("path", [f"/status?token={TOKEN}", "/?token=wrong", "/?token=", "/?x=%ff"])
def test_token_elsewhere_in_an_address_opens_nothing(guarded: StatusServer, path):
    answer = ask(guarded, path)
    assert answer.code == 401
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("header", "name"),
    [("LocalHost:80", "localhost"), ("[::1]:80", "::1"), ("[0:0::1]", "::1"), ("a.b.", "a.b"),
     ("::1", ""), ("[x]", ""), ("a:b", ""), ("[::1]x", ""), ("a:", "")],
)  # fmt: skip
def test_host_header_is_read_strictly(header, name):
    assert host_name(header) == name
