"""Processes started by a launcher: torchrun, accelerate launch, srun, Ray or a Kubernetes operator.

Launchers describe each process by environment variables. Slurm has its own; all others set those
of `torch.distributed`. Imports no torch.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# The variables of one process; its worker gets them from the supervisor instead.
OWN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)
# Ports for Slurm, which names none: below those that Linux gives to outgoing connections.
FIRST_PORT, PORTS = 20000, 12000


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among all that a launcher has started, and where they meet.

    `has_agent_store` says that the launcher serves the store at that address; otherwise rank 0
    does.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    address: str
    port: int
    launcher: str = "the launcher"
    has_agent_store: bool = False

    @property
    def is_first(self) -> bool:
        """Return whether this process supervises the run."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Return whether there is no other process."""
        return self.count == 1

    @property
    def spans_hosts(self) -> bool:
        """Return whether other hosts take part."""
        return self.local_count < self.count


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Return how a launcher started this process; None if none did.

    Raises:
        ValueError: variables are missing or make no sense; the text names them.
    """
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return _checked(_from_torch(environ))
    if _number(environ, "SLURM_STEP_NUM_TASKS", 0) > 1 and "SLURM_PROCID" in environ:
        return _checked(_from_slurm(environ))
    return None


def is_silent(environ: Mapping[str, str]) -> bool:
    """Return whether another process of this host speaks for this one."""
    try:
        launch = read_launch(environ)
    except ValueError:
        return False
    return launch is not None and not launch.is_first and launch.local_rank > 0


def network_of(launch: Launch) -> dict[str, str]:
    """Return the variables that bind gloo and NCCL to the rendezvous's network interface."""
    if not launch.spans_hosts or launch.address == "localhost" or launch.address[:4] == "127.":
        return LOOPBACK
    name = interface_to(launch.address)
    # NCCL takes a bare name as a prefix of names.
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def interface_to(address: str) -> str:
    """Return the interface from which this host reaches another, or itself; "" if unknown."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            return "" if name == "lo" else name
    return ""


def _from_torch(environ: Mapping[str, str]) -> Launch:
    count, rank = _number(environ, "WORLD_SIZE"), _number(environ, "RANK")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing and count > 1:
        raise ValueError(f"{' and '.join(missing)} must be set beside RANK and WORLD_SIZE")
    return Launch(
        rank,
        count,
        # Operators that start one process per host set no local rank.
        _number(environ, "LOCAL_RANK", 0),
        _number(environ, "LOCAL_WORLD_SIZE", count if "LOCAL_RANK" in environ else 1),
        environ.get("MASTER_ADDR", ""),
        _number(environ, "MASTER_PORT", 0),
        "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "the launcher",
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    rank, count = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    tasks = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environ, "SLURM_NODEID", 0)
    job = _number(environ, "SLURM_JOB_ID", 0) * 8 + _number(environ, "SLURM_STEP_ID", 0)
    return Launch(
        rank,
        count,
        _number(environ, "SLURM_LOCALID", 0),
        tasks[node] if node < len(tasks) else 1,
        environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "")),
        _number(environ, "MASTER_PORT", FIRST_PORT + job % PORTS),
        "srun",
    )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as `gpu[03-07,12],login`."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def _tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's form of it: `2(x3),1` is 2, 2, 2, 1."""
    tasks: list[int] = []
    for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.count:
        raise ValueError(f"RANK {launch.rank} is not below WORLD_SIZE {launch.count}")
    if not 0 <= launch.local_rank < launch.local_count <= launch.count:
        raise ValueError(
            f"LOCAL_RANK {launch.local_rank} and LOCAL_WORLD_SIZE {launch.local_count} do not fit "
            f"WORLD_SIZE {launch.count}"
        )
    if not launch.is_alone and not (launch.address and 0 < launch.port < 1 << 16):
        raise ValueError(f"{launch.address}:{launch.port} is no address to meet at")
    return launch


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise ValueError(f"{name} is not a number: {text!r}")
    return int(text)


def host_name() -> str:
    """Return this host's name for messages."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
