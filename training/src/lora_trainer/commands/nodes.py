"""`lora-trainer train --nnodes 2`: one node of several, started by PyTorch's elastic agent.

The agent is torchrun, as a child process, so that this one imports no torch. It restarts all
processes when one is lost. What it does not do is done here: a stop takes as long as the
checkpoint does, an error that a restart would repeat ends the node, and the exit code is the
run's. Every node runs the same command with its own `--node_rank`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..config.settings import Settings
from ..errors import ConfigError, InternalError, MemoryKilledError, StoppedError
from ..host import interrupts
from ..host.environment import EXIT_CODES
from ..host.scratch import TEMPORARY, scratch_folder
from ..machine import read_machine
from ..plan import process_count
from ..supervise.endings import FINAL_CODES
from ..supervise.stop_signals import STOPS
from ..supervise.workers import python_path
from .node_options import endpoint_of_operator
from .train import refuse_old_torch

POLL_SECONDS = 0.2
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# A killed worker, though, may have been killed by hand or with its host's memory full.
REPEATED_CODES = FINAL_CODES - {0, MemoryKilledError.exit_code}


@dataclass(frozen=True, slots=True)
class Node:
    """This node among all, in torchrun's words."""

    nnodes: str
    nproc_per_node: str
    node_rank: int | None
    rdzv_endpoint: str
    rdzv_id: str = "lora"

    def options(self) -> list[str]:
        """Return torchrun's options.

        Raises:
            ConfigError: some are missing, or make no sense.
        """
        self._check_numbers()
        own = ["--nnodes", self.nnodes, "--nproc-per-node", self.nproc_per_node]
        endpoint = self.rdzv_endpoint or endpoint_of_operator()
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError.of(
                "several nodes need an address to meet at",
                where=f"--rdzv_endpoint {self.rdzv_endpoint}".rstrip(),
                why="it is the host of node 0 and a free port on it",
                remedy="--rdzv_endpoint HOST:29500",
            )
        if self.node_rank is not None:
            # Only the static rendezvous keeps the order of nodes, and so the dashboard on node 0.
            meeting = ["--master-addr", host, "--master-port", port]
            return [*own, "--node-rank", str(self.node_rank), *meeting]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        return [*own, *meeting, "--rdzv-id", self.rdzv_id]

    def _check_numbers(self) -> None:
        if re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.nnodes):
            # Its agent would stop all processes when a host joins, and a stop ends a node.
            raise ConfigError.of(
                "a range of hosts needs torchrun",
                where=f"--nnodes {self.nnodes}",
                why="here every start has the same number of hosts",
                # With a shared store, torch 2.13's agents wait forever for a host that joins.
                remedy=f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes {self.nnodes} "
                "--nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
                "--max-restarts 3 training/train_lora.py, with the other options as here; or "
                "--nnodes with one number",
            )
        if not re.fullmatch(r"[1-9]\d*", self.nnodes):
            raise ConfigError.of(
                "not a number of hosts",
                where=f"--nnodes {self.nnodes}",
                why="it is a whole number",
                remedy="--nnodes 2",
            )
        if not re.fullmatch(r"[1-9]\d*|auto|gpu|cpu", self.nproc_per_node):
            raise ConfigError.of(
                "not a number of processes",
                where=f"--nproc_per_node {self.nproc_per_node}",
                why="it is a whole number, or auto, gpu or cpu",
                remedy="leave it out: one process per GPU",
            )
        if self.node_rank is not None and not 0 <= self.node_rank < int(self.nnodes):
            raise ConfigError.of(
                "there is no such host",
                where=f"--node_rank {self.node_rank} --nnodes {self.nnodes}",
                why="hosts count from 0",
                remedy=f"--node_rank 0 to {int(self.nnodes) - 1}, each on one host",
            )


def run_node(node: Node, settings: Settings, config: Path | None, arguments: Sequence[str]) -> int:
    """Run this node's processes with the arguments of `train`; return the exit code.

    Raises:
        ConfigError: the options make no sense.
        StoppedError: before there was a process.
        UnavailableError: the processes could not meet with this torch.
    """
    refuse_old_torch(importlib.metadata.version("torch"), "leave out --nnodes")
    named = ("--config", str(config)) if config is not None else ()
    if not node.nproc_per_node:
        count = process_count(settings.config, read_machine())
        node = Node(node.nnodes, str(count), node.node_rank, node.rdzv_endpoint, node.rdzv_id)
    restarts = str(settings.config.monitoring.max_restarts)
    options = [*node.options(), "--max-restarts", restarts, "--monitor-interval", "1"]
    process = ["-m", "lora_trainer", "train", *named, *arguments]
    with scratch_folder(Path(tempfile.gettempdir()), TEMPORARY) as folder:
        agent_command = [sys.executable, "-m", "torch.distributed.run", *options]
        agent_command += ["--log-dir", str(folder / "logs")]
        environment = os.environ | {EXIT_CODES: str(folder)} | python_path()
        agent = subprocess.Popen(
            [*agent_command, *process],
            env=environment,
            start_new_session=True,
            preexec_fn=_stop_with_parent,  # noqa: PLW1509  one system call, which takes no lock
        )
        is_stopped = threading.Event()

        def stop(*_: object) -> None:
            is_stopped.set()
            _stop(agent)

        with interrupts.handled(stop, STOPS):
            _wait(agent, folder)
        codes = _codes(folder)
    if agent.returncode == 0:
        return 0
    code = codes.get(0) or next(filter(None, codes.values()), 0)
    if not code and is_stopped.is_set():
        raise StoppedError.of(
            "stopped",
            where="processes that train together",
            why="received a stop signal before they had met",
            remedy="run the same command again",
        )
    return code or InternalError.exit_code


def _stop_with_parent() -> None:
    """Let the kernel ask the agent to stop once this process is gone, were it killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_process(run: Callable[[], int]) -> int:
    """Run one process of a node; return its exit code, and leave it for the node's.

    The agent starts a process again whatever it ended with: one that would end with the same code,
    or was stopped, does not begin.
    """
    folder = Path(os.environ[EXIT_CODES])
    if code := final_code(folder):
        return code
    code = run()
    file = folder / os.environ.get("RANK", "0")
    with contextlib.suppress(FileNotFoundError):  # the node's command was killed, and left it
        file.with_suffix(".new").write_text(str(code))
        file.with_suffix(".new").replace(file)
    return code


def _wait(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the agent and its processes; end it where another start would end as the last one.

    The processes of an agent that was killed notice it, and save.
    """
    processes: list[psutil.Process] = []
    is_ending = is_ended = False
    while agent.poll() is None:
        if not is_ending:
            is_ending = bool(final_code(folder))
            processes = _processes(agent) or processes
        if is_ending and not is_ended and not any(map(_runs, processes)):
            is_ended = True
            _kill(agent)
        time.sleep(POLL_SECONDS)
    while any(map(_runs, processes)):
        time.sleep(POLL_SECONDS)


def final_code(folder: Path) -> int:
    """Return an exit code of this node that another start would end with again; 0: none."""
    return next((code for code in _codes(folder).values() if code in REPEATED_CODES), 0)


def _codes(folder: Path) -> dict[int, int]:
    """Return the exit codes so far by rank, the first to end first."""
    files = [path for path in folder.glob("[0-9]*") if path.name.isdigit()]
    files.sort(key=lambda path: path.stat().st_mtime_ns)
    return {int(path.name): int(path.read_text()) for path in files}


def _stop(agent: subprocess.Popen[bytes]) -> None:
    """Stop the processes, not the agent: it would kill them after 30 s."""
    processes = _processes(agent)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    if not processes:
        _kill(agent)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """End the agent, and what it has just started again.

    SIGTERM would end the output with a traceback of its own.
    """
    agent.send_signal(signal.SIGSTOP)  # it starts nothing meanwhile
    for process in _processes(agent):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    agent.kill()


def _processes(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that the agent has started and that run."""
    try:
        return [one for one in psutil.Process(agent.pid).children() if _runs(one)]
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
