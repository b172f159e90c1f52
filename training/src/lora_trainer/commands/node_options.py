"""The options of `train` for several nodes: torchrun's names, and its variables (PET_*)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import typer

Nodes = Annotated[
    str,
    typer.Option(
        "--nnodes",
        envvar="PET_NNODES",
        help="Hosts that train together; each runs this command.",
    ),
]
NodeRank = Annotated[
    int | None,
    typer.Option("--node_rank", envvar="PET_NODE_RANK", help="This host's number, from 0."),
]
Endpoint = Annotated[
    str,
    typer.Option(
        "--rdzv_endpoint",
        envvar="PET_RDZV_ENDPOINT",
        help="Where hosts meet: host 0 and a free port on it, HOST:29500.",
    ),
]
ProcessesPerNode = Annotated[
    str,
    typer.Option(
        "--nproc_per_node",
        envvar="PET_NPROC_PER_NODE",
        help="Processes on this host; default: the key nproc.",
    ),
]


def endpoint_of_operator() -> str:
    """Return the address that Kubeflow's Trainer gives torchrun's static rendezvous."""
    address = os.environ.get("PET_MASTER_ADDR", "")
    return f"{address}:{os.environ.get('PET_MASTER_PORT', '29500')}" if address else ""


def with_processes(arguments: Sequence[str], nnodes: str, nproc_per_node: str) -> list[str]:
    """Return the arguments with the number of processes of the only node, if it is given."""
    has_own = any(argument.split("=")[0] == "--nproc" for argument in arguments)
    is_alone = nnodes == "1" and "RANK" not in os.environ
    if not is_alone or has_own or nproc_per_node in ("", "auto", "gpu"):
        return list(arguments)
    return ["--nproc", nproc_per_node, *arguments]


def is_node(nnodes: str) -> bool:
    """Return whether to start a node's processes; one that a launcher has started joins."""
    return nnodes != "1" and "RANK" not in os.environ
