"""A Ray cluster on this machine: every node is a `ray start` with processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from support.launched import free_port

SECONDS = 180.0


class Cluster:
    """Nodes with one CPU each, so that every node takes one worker."""

    def __init__(self, root: Path, python: Path, environment: dict[str, str]) -> None:
        port, dashboard = free_port(), free_port()
        self.root = root
        self.python = python
        self.address = f"127.0.0.1:{port}"
        self.jobs = f"http://127.0.0.1:{dashboard}"
        self.environment = environment | {"RAY_USAGE_STATS_ENABLED": "0"}
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._start("--head", f"--port={port}", f"--dashboard-port={dashboard}")

    def add_node(self) -> None:
        """Start another node."""
        self._start(f"--address={self.address}")

    def job(self, *arguments: str) -> str:
        """Call `ray job`; return what it printed."""
        done = subprocess.run(
            [self.python.parent / "ray", "job", *arguments],
            env=self.environment | {"RAY_ADDRESS": self.jobs},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill_node(self, number: int) -> None:
        """Kill all processes of a node at once, as a power cut does."""
        node = self.nodes[number]
        family = [psutil.Process(node.pid)]
        family += family[0].children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        """End every node."""
        for number, node in reversed(list(enumerate(self.nodes))):
            if node.poll() is None:
                self.kill_node(number)

    def _start(self, *options: str) -> None:
        number = len(self.nodes)
        log = self.root / f"node{number}.log"
        command = [self.python, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += ["--num-cpus=1", "--memory=4000000000", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats", f"--node-ip-address=127.0.0.{number + 1}"]
        if number == 0:
            command += [f"--temp-dir={self.root / 'ray'}"]
        with log.open("wb") as out:
            self.nodes.append(
                subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)
            )
        until = time.monotonic() + SECONDS
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            assert self.nodes[number].poll() is None, log.read_text()
            time.sleep(0.2)


@contextlib.contextmanager
def running(root: Path, python: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Start a cluster of two nodes, and end it."""
    cluster = Cluster(root, python, environment | {"PATH": f"{python.parent}:{os.environ['PATH']}"})
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.stop()
