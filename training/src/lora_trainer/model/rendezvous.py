"""How processes that a launcher has started find each other: through the launcher's store.

torchrun's agent serves a `TCPStore` at MASTER_ADDR:MASTER_PORT; for other launchers rank 0 does,
on that address alone. A store may outlive the processes that used it: torchrun keeps one across
all restarts. So rank 0 waits until every process of *this* start has answered, and from then on
they share values under a key that no earlier start has used.
"""

from __future__ import annotations

import datetime
import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as c10d

from ..errors import UnavailableError
from ..host.launcher import Launch, host_name

# A process may have to pull an image, or wait for a node to boot, before it comes.
JOIN_SECONDS = 900.0
POLL_SECONDS = 0.05
RETRY_SECONDS = 0.5
OPERATION_SECONDS = 10.0  # for one operation of a store that answers


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the processes of one start share: a store of their own, and each one's host."""

    store: Any
    key: str
    hosts: Sequence[str]


def connect(launch: Launch) -> Any:
    """Return the store; rank 0 serves it unless the launcher does.

    Raises:
        UnavailableError: nothing answers there.
    """
    if launch.is_first and not launch.has_agent_store and (listening := _listen(launch)):
        return c10d.TCPStore(  # type: ignore[attr-defined]
            launch.address,
            launch.port,
            launch.count,
            True,
            datetime.timedelta(seconds=OPERATION_SECONDS),
            False,
            master_listen_fd=listening.detach(),
        )
    return client_of(launch, OPERATION_SECONDS)


def client_of(launch: Launch, operation_seconds: float) -> Any:
    """Return a connection to the store, once something answers.

    Raises:
        UnavailableError: nothing does.
    """
    until = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            # The store's own constructor would not let a stop signal through.
            socket.create_connection((launch.address, launch.port), OPERATION_SECONDS).close()
            timeout = datetime.timedelta(seconds=operation_seconds)
            return c10d.TCPStore(  # type: ignore[attr-defined]
                launch.address, launch.port, launch.count, False, timeout, False
            )
        except (OSError, RuntimeError) as error:
            if time.monotonic() > until:
                raise _unreachable(launch, str(error).splitlines()[0]) from None
        time.sleep(RETRY_SECONDS)


def _unreachable(launch: Launch, why: str) -> UnavailableError:
    return UnavailableError.of(  # type: ignore[return-value]
        "the other processes cannot be reached",
        where=f"MASTER_ADDR:MASTER_PORT {launch.address}:{launch.port}, from {host_name()}",
        why=f"{why}, for {JOIN_SECONDS:.0f} s",
        remedy="check that this host resolves and reaches that address, and that no firewall "
        "is in between",
    )


def _listen(launch: Launch) -> socket.socket | None:
    """Listen on the rendezvous address; None if somebody, such as Ray, serves a store there."""
    family, _, _, _, target = socket.getaddrinfo(
        launch.address, launch.port, type=socket.SOCK_STREAM
    )[0]
    for address in (target, ("", launch.port)):  # a service's address is none of this host's own
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen()
            return listening
        except OSError as error:
            listening.close()
            if error.errno == 98:
                return None
    return None


def meet(
    store: Any, rank: int, count: int, progress: Callable[[int], None] = lambda _: None
) -> Meeting:
    """Wait for all processes of this start; `progress` gets the number of those that are here.

    Raises:
        UnavailableError: some did not come; their numbers are named.
    """
    own = json.dumps([secrets.token_hex(8), host_name()])
    store.set(f"hello/{rank}", own)
    gather = _gathered if rank == 0 else _joined
    until = time.monotonic() + JOIN_SECONDS
    published = ""
    while True:
        key, hellos, published = gather(store, rank, count, own, published)
        if key:
            hosts = [json.loads(hello)[1] for hello in hellos]
            own_store = c10d.PrefixStore(key, store)  # type: ignore[attr-defined]
            return Meeting(own_store, key, hosts)
        progress(len(list(filter(None, hellos))))
        if time.monotonic() > until:
            raise _absent([number for number, hello in enumerate(hellos) if not hello])
        time.sleep(POLL_SECONDS)


def _gathered(
    store: Any, _rank: int, count: int, own: str, published: str
) -> tuple[str, list[str], str]:
    """Ask all who have said hello to confirm; rank 0. Return the key once they have."""
    hellos = [own, *(read(store, f"hello/{rank}") for rank in range(1, count))]
    if not all(hellos):
        return "", hellos, published
    key, *before = json.loads(published) if published else [""]
    if before != hellos:  # at first, and where one was left of an earlier start
        key = secrets.token_hex(8)
        for rank in range(count):
            store.set(f"{key}/beat/{rank}", "0")
        for name in ("failed", "lost", "orphan", "finished"):
            store.set(f"{key}/{name}", "")
        published = json.dumps([key, *hellos])
        store.set("session", published)
    if all(read(store, f"{key}/here/{rank}") for rank in range(1, count)):
        store.set(f"{key}/go", "1")
        return key, hellos, published
    return "", hellos, published


def _joined(
    store: Any, rank: int, count: int, own: str, published: str
) -> tuple[str, list[str], str]:
    """Confirm to rank 0; return the key once everybody has."""
    session = read(store, "session")
    key, *hellos = json.loads(session) if session else [""]
    if len(hellos) != count or hellos[rank] != own:
        return "", ["", *["present"] * (count - 1)], published
    store.set(f"{key}/here/{rank}", "1")
    return (key if read(store, f"{key}/go") else ""), hellos, published


def read(store: Any, key: str) -> str:
    """Return a value of the store; empty if there is none."""
    return store.get(key).decode() if store.check([key]) else ""


def _absent(ranks: Sequence[int]) -> UnavailableError:
    names = ", ".join(map(str, ranks)) or "some"
    return UnavailableError.of(  # type: ignore[return-value]
        f"rank {names} did not start",
        where=f"rendezvous, on {host_name()}",
        why=f"the other processes waited for {JOIN_SECONDS:.0f} s",
        remedy="see what the launcher says of that process",
    )
