"""Talks to a status server over real sockets, as clients do that keep to no rules."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lora_trainer.serve.server import StatusServer

SECONDS = 30.0  # CI machines are slow


class Answer(NamedTuple):
    code: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(server: StatusServer, path: str, method: str = "GET", **headers: str) -> Answer:
    """Ask one question on a connection of its own; `host_` sets the Host header."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    try:
        sent = {name.replace("_", "-").strip("-"): value for name, value in headers.items()}
        connection.request(method, path, headers=sent)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def say(server: StatusServer, data: bytes) -> bytes:
    """Send bytes; return everything until the server closes or falls silent."""
    with connected(server) as client:
        client.settimeout(5)
        received = b""
        try:
            client.sendall(data)
            while part := client.recv(65536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


@contextmanager
def connected(server: StatusServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as client:
        yield client


def is_closed(client: socket.socket, within: float = SECONDS) -> bool:
    """Return whether the server closes the connection in time."""
    client.settimeout(within)
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


class Stream:
    """An open /events, read event by event."""

    def __init__(self, server: StatusServer, last_id: str = "", **headers: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        sent = {"Last-Event-ID": last_id} if last_id else {}
        self._connection.request("GET", "/events", headers=sent | headers)
        self._answer = self._connection.getresponse()
        self.code = self._answer.status
        if self.code == 200:
            assert self._answer.readline().startswith(b"retry:")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()
        self._connection.close()

    def next(self, *wanted: str) -> tuple[str, str, Any]:
        """Return kind, id and data of the next event of a wanted kind."""
        until = time.monotonic() + SECONDS
        fields: dict[str, str] = {}
        while time.monotonic() < until:
            line = self._answer.readline().decode().rstrip("\n")
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields and (not wanted or fields["event"] in wanted):
                return fields["event"], fields.get("id", ""), json.loads(fields["data"])
            elif not line:
                fields = {}
        raise AssertionError(f"no {wanted} came")
