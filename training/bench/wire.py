"""How much a step sends over the network between hosts, and how long that takes.

    python bench/wire.py                predict: bytes and seconds for 1 to 64 hosts
    sudo python bench/wire.py --measure [--hosts 2] [--gbit 1] [--steps 5]
                                        compare with real steps between network namespaces

With a frozen base only the adapter's gradients travel: one all-reduce of one float32 bucket a step
(`model/ranks.py`). A ring of N processes sends 2 (N - 1) / N buckets out of every host, however
many processes a host has, because the ring enters and leaves each host once. The prediction assumes
that nothing else uses the link and that no computation hides the transfer: this project sums after
the last micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TRAINING / "src"))

FLOAT_BYTES = 4
FIGURES = 6  # of each process, in the bucket; `model/ranks.py`
# A full Ethernet frame: 1448 bytes of payload in 1500 of IP, with 38 of header, preamble and gap.
PAYLOAD_BYTES, FRAME_BYTES, ON_WIRE_BYTES = 1448, 1514, 1538
HOSTS = (1, 2, 4, 8, 16, 32, 64)
RATES_GBIT = (1, 10, 100)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama, from which its adapter follows."""

    name: str
    layers: int
    hidden: int
    inner: int
    key_value: int
    parameters: int

    def adapter(self, rank: int) -> list[int]:
        """Return the number of elements of each LoRA tensor, on all linear layers."""
        hidden, inner, key_value = self.hidden, self.inner, self.key_value
        linear = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
        linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
        return [rank * side for pair in linear for side in pair] * self.layers


LLAMA_2_7B = Shape("Llama 2 7B", 32, 4096, 11008, 4096, 6_738_415_616)
LLAMA_2_70B = Shape("Llama 2 70B", 80, 8192, 28672, 1024, 68_976_648_192)
SHAPES = {"7b": LLAMA_2_7B, "70b": LLAMA_2_70B}


def bucket_bytes(tensors: list[int], ranks: int) -> int:
    """Return the size of a step's bucket: gradients, which of them exist, loss, and figures."""
    return FLOAT_BYTES * (sum(tensors) + len(tensors) + 1 + FIGURES * ranks)


def sent_bytes(tensors: list[int], ranks: int) -> int:
    """Return what every host sends in a step, without headers; as much as it receives."""
    return round(2 * (ranks - 1) / ranks * bucket_bytes(tensors, ranks))


def seconds(sent: int, gbit: float) -> float:
    """Return how long a link of that rate takes, frames included."""
    return sent * ON_WIRE_BYTES / PAYLOAD_BYTES * 8 / (gbit * 1e9)


def prediction(rank: int, per_host: int) -> str:
    """Return the tables."""
    rates = "".join(f"{rate:>8} Gbit/s" for rate in RATES_GBIT)
    lines = []
    for shape in SHAPES.values():
        tensors = shape.adapter(rank)
        lines.append(f"{shape.name}, rank {rank}: {sum(tensors):,} trainable parameters")
        lines.append(f"{'hosts':<22}{'MB':>10}{rates}")
        for hosts in HOSTS:
            sent = sent_bytes(tensors, hosts * per_host) if hosts > 1 else 0
            lines.append(_row(f"{hosts} x {per_host} processes", sent))
        # In bf16, gathered for the forward and again for the backward pass.
        lines += [_row("base over many hosts*", 2 * 2 * shape.parameters), ""]
    return "\n".join([*lines, "* sharded without a copy on every host, for each micro-batch"])


def _row(name: str, sent: int) -> str:
    times = "".join(f"{seconds(sent, rate):>13.3f} s" for rate in RATES_GBIT)
    return f"{name:<22}{sent / 1e6:>10,.1f}{times}"


# --- real steps between network namespaces ---------------------------------------------------


@contextmanager
def namespaces(hosts: int, gbit: float) -> Iterator[list[str]]:
    """Create hosts on one bridge, each behind a link of that rate; 0 leaves it unlimited."""
    hub = f"wire{os.getpid()}"
    names = [f"{hub}-{host}" for host in range(hosts)]
    with ExitStack() as stack:
        for name in (hub, *names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for host, name in enumerate(names):
            port = ("link", "add", f"port{host}", "type", "veth", "peer", "name", "eth0")
            _ip("-n", hub, *port, "netns", name)
            if not gbit:
                # Packets of the size that a network card sends, so that every header is counted.
                # It costs too much processor time to fill a fast link that way.
                _ip("-n", name, "link", "set", "eth0", "gso_max_segs", "1")
            _ip("-n", hub, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            if gbit:
                limit = ("tbf", "rate", f"{gbit * 1000:g}mbit", "burst", "1mb", "latency", "50ms")
                _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *limit)
        yield names


def measure(shape: str, rank: int, hosts: int, gbit: float, steps: int) -> dict[str, Any]:
    """Run steps on hosts; return bytes and seconds of a step, measured and predicted."""
    given = {"shape": shape, "rank": rank, "hosts": hosts, "steps": steps}
    with tempfile.TemporaryDirectory() as folder, namespaces(hosts, gbit) as names:
        options = [f"--{name}={value}" for name, value in (given | {"at": folder}).items()]
        command = [sys.executable, __file__, *options]
        workers = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, f"--number={number}"],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            )
            for number, name in enumerate(names)
        ]
        printed = [worker.communicate()[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError("a host failed")
    results = [json.loads(text) for text in printed]
    payload = sent_bytes(SHAPES[shape].adapter(rank), hosts)
    # A limited link counts packets of up to 64 KB, whose one header is negligible.
    predicted = payload if gbit else round(payload * FRAME_BYTES / PAYLOAD_BYTES)
    return given | {
        "gbit": gbit,
        "payload_bytes": payload,
        "bytes": round(max(result["bytes"] for result in results)),
        "predicted_bytes": predicted,
        "seconds": round(max(result["seconds"] for result in results), 3),
        "predicted_seconds": round(predicted * 8 / (gbit * 1e9), 3) if gbit else None,
    }


def work(given: argparse.Namespace) -> None:
    """Be one host: take part in the steps' sums; print bytes and seconds of a step."""
    import torch

    from lora_trainer.model.ranks import join, sum_step
    from lora_trainer.run.events import RankFigures

    ranks = join(given.number, given.hosts, f"{given.at}/store")
    sizes = SHAPES[given.shape].adapter(given.rank)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    figures = RankFigures(
        rank=given.number,
        seconds=1.0,
        tokens=1,
        memory_bytes=0,
        gpu_memory_bytes=0,
        micro_batch_examples=1,
        gradient_checkpointing=0,
    )
    before, waited = 0, 0.0
    for step in range(given.steps + 1):
        if step == 1:  # the first one opens connections
            before = _bytes_sent()
        ranks.wait()
        sum_step(ranks, parameters, torch.tensor(1.0), figures)
    ranks.wait()
    sent = (_bytes_sent() - before) / given.steps
    bucket = torch.ones(bucket_bytes(sizes, given.hosts) // FLOAT_BYTES)
    for _ in range(given.steps):
        ranks.wait()
        begun = time.perf_counter()
        ranks.summed(bucket)  # without the copies into the bucket and out of it
        waited += time.perf_counter() - begun
    print(json.dumps({"bytes": sent, "seconds": waited / given.steps}))


def _bytes_sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main() -> int:
    """Predict or measure; return the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--measure", action="store_true", help="real steps; needs root")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of Llama 2")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--per-host", type=int, default=8, help="processes, for the prediction")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--gbit", type=float, default=0.0, help="rate of the links; 0: unlimited")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.at:
        work(given)
    elif given.measure:
        measured = measure(given.shape, given.rank, given.hosts, given.gbit, given.steps)
        print(json.dumps(measured))
    else:
        print(prediction(given.rank, given.per_host))
    return 0


if __name__ == "__main__":
    sys.exit(main())
