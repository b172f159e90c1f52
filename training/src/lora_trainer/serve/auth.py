"""Access control of the status server: method, Host, token; and the headers of every response.

A page of another site can make a browser send requests here, and with a host name that resolves to
this address it could read the answers (DNS rebinding): unknown host names are rejected. Imports no
web framework.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD")
OPEN_PATH = "/health"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
COOKIE_SECONDS = 30 * 24 * 3600
HEADERS = (
    (
        b"content-security-policy",
        # Styles inline: the chart library puts style elements into its shadow roots.
        b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        b"object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class AccessGuard:
    """Wraps the server's application; lets through what is allowed.

    Everything except /health requires the token, if there is one: as `Authorization: Bearer`, or as
    the cookie that `/?token=` sets. The cookie holds a digest of the token, and its name the port,
    because browsers send cookies to all ports of a host.
    """

    def __init__(self, app: App, *, names: Iterable[str], token: str, port: int) -> None:
        self._app = app
        self._names = frozenset(name.lower().rstrip(".") for name in names)
        self._token = token.encode()
        self._cookie = f"lora_trainer_{port}"
        self._session = hmac.new(self._token, b"dashboard", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name, value) for name, value in message.get("headers", ())]
                named = {name for name, _ in own}
                message["headers"] = own + [pair for pair in HEADERS if pair[0] not in named]
            await send(message)

        if scope["method"] not in METHODS:
            extra = ((b"allow", b", ".join(name.encode() for name in METHODS)),)
            await refuse(send_guarded, 405, "only GET and HEAD are allowed", extra)
        elif not self._is_known(headers.get(b"host", ""), scope):
            await refuse(send_guarded, 421, "unknown host name: add it to health_allowed_hosts")
        elif self._token and scope["path"] != OPEN_PATH and not self._is_allowed(headers):
            await self._ask(scope, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _is_known(self, host: str, scope: Scope) -> bool:
        name = host_name(host)
        # By number it can only be meant for the address at which it arrived.
        arrived = (scope.get("server") or ("",))[0]
        return bool(name) and (name in self._names or name == arrived)

    def _is_allowed(self, headers: dict[bytes, str]) -> bool:
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
            return True
        try:
            morsel = SimpleCookie(headers.get(b"cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(
            morsel.value.encode(), self._session.encode()
        )

    async def _ask(self, scope: Scope, send: Send) -> None:
        """Take the token of `/?token=` for a cookie, or ask for it."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.get("token", [""])[0].encode("latin-1", "replace")
        if scope["path"] == "/" and given and hmac.compare_digest(given, self._token):
            cookie = (
                f"{self._cookie}={self._session}; Path=/; Max-Age={COOKIE_SECONDS}; "
                "HttpOnly; SameSite=Strict"
            )
            headers = ((b"location", b"/"), (b"set-cookie", cookie.encode()))
            await refuse(send, 303, "", headers)
            return
        text = "a token is required: send Authorization: Bearer TOKEN, or open /?token=TOKEN once"
        await refuse(send, 401, text, ((b"www-authenticate", b"Bearer"),))


async def refuse(
    send: Send, code: int, text: str, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error, as JSON."""
    body = json.dumps({"error": text}).encode() + b"\n"
    kept = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": code, "headers": kept})
    await send({"type": "http.response.body", "body": body})


def host_name(header: str) -> str:
    """Return the name or the number in a Host header, without its port; "" if it is neither."""
    text = header.strip().lower()
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        if not closed or (port and not _is_port(port)):
            return ""
        try:
            return str(ipaddress.IPv6Address(name))
        except ValueError:
            return ""
    name, colon, port = text.partition(":")
    if colon and not _is_port(colon + port):
        return ""
    return name.rstrip(".")


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isascii() and text[1:].isdigit()


def own_names(host: str, extra: Iterable[str]) -> list[str]:
    """Return the names under which this server may be asked."""
    machine = socket.gethostname()
    return [*LOCAL_NAMES, host.strip("[]"), machine, machine.partition(".")[0], *extra]
