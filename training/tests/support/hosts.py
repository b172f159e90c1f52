"""Two hosts on one machine: network namespaces with a cable between them, each with a name."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.trainer import Run, Trainer

PORT = 29500


@dataclass(frozen=True)
class Hosts:
    """The hosts' namespaces, in order; their addresses are 10.78.0.1 and 10.78.0.2."""

    names: tuple[str, ...]

    def start(self, trainer: Trainer, output: Path, host: int, **changed: Any) -> Run:
        """Start that host's two processes by `--nnodes`."""
        command = [*trainer.command(output, **changed), "--nnodes", str(len(self.names))]
        command += ["--node_rank", str(host), "--nproc_per_node", "2"]
        command += ["--rdzv_endpoint", f"10.78.0.1:{PORT}"]
        named = f'hostname host{host}; exec "$@"'
        # A host has its own network and name; everything else is shared, as the output folder is.
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", named]
        return Run([*inside, "sh", *command], output, trainer.environment())

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.names[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self.names[1], "link", "set", "eth0", "up")

    def slow(self, rate: str) -> None:
        """Limit the cable to a rate in the words of `tc`; what waits longer than 50 ms is lost."""
        for name in self.names:
            limit = ("tbf", "rate", rate, "burst", "16kb", "latency", "50ms")
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *limit)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Create the hosts; remove them at the end."""
    names = tuple(f"host{os.getpid()}-{number}" for number in range(2))
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_remove, name)
            _ip("-n", name, "link", "set", "lo", "up")
        peer = ("peer", "name", "eth0", "netns", names[1])
        _ip("-n", names[0], "link", "add", "eth0", "type", "veth", *peer)
        for number, name in enumerate(names):
            _ip("-n", name, "address", "add", f"10.78.0.{number + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield Hosts(names)


def _remove(name: str) -> None:
    """Remove a host, and the processes that a failed test has left on it."""
    listed = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True)
    for pid in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
