"""Connection limits that uvicorn does not have, so that no client can overload the server.

uvicorn (0.54) limits the size of request headers and the idle time of connections, but not the time
to send headers, the number of connections, or how long a response may stay unread. Each has a limit
here; at the maximum number of connections, the longest idle one is closed.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 15.0  # for a whole request, from the connection or the answer before
UNREAD_SECONDS = 30.0  # that an answer may wait for its reader
MOST_CONNECTIONS = 512  # under the 1024 files that a process usually may open
HEAD_BYTES = 16 * 1024
SEND_BYTES = 128 * 1024


class BoundedProtocol(H11Protocol):
    """One connection, with a deadline for every state in which it waits for its client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, closing another one if there are too many."""
        super().connection_made(transport)
        # The kernel would take megabytes for each client that does not read.
        accepted = transport.get_extra_info("socket")
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if len(self.connections) > MOST_CONNECTIONS and not self._make_room():
            transport.abort()
            return
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Take up what came; a request that is complete ends the wait."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait_for_request()
        super().on_response_complete()  # which may begin a request that has come already
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()

    def pause_writing(self) -> None:
        """Give the client some time to read."""
        super().pause_writing()
        self._cancel()
        self._deadline = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        self._cancel()
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._cancel()

    def _wait_for_request(self) -> None:
        self._cancel()
        self._waits_since = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _cancel(self) -> None:
        self._waits_since = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _make_room(self) -> bool:
        waiting = [
            one
            for one in self.connections
            if one is not self and isinstance(one, BoundedProtocol) and one._waits_since is not None
        ]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda one: one._waits_since or 0.0)
        oldest.transport.abort()  # which is noticed later; its place is free now
        oldest._cancel()
        self.connections.discard(oldest)
        return True
