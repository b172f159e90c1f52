"""Measure the cost of the status server: startup time, latency, training speed.

    python bench/status_server.py                       # the default job, about 10 minutes
    python bench/status_server.py --tiny --pairs 2      # a random two-layer model, a minute

Three measurements on this machine, over loopback alone:
  first    from the start of the process to the first 200 of /health, several starts
  health   the latency of /health, 20 requests a second while all cores train
  clients  training speed with 200 slow and 50 streaming clients against none, in stretches
           of one run that alternate (none, all, all, none, ...), so that what else changes
           on the machine meets both; tokens of the steps that lie wholly in a stretch
Slow clients either send a request byte by byte or leave its answer unread. The clients'
own work is on this machine too; they run at the lowest priority, and their share of a
processor is told beside the supervisor's own, with them and without. Prints a line for each
figure and, last, all of it as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING = Path(__file__).resolve().parents[1]
SLOW, STREAMING = 200, 50
ASKS_PER_SECOND = 20
SETTLING_STEPS = 5
PATIENCE_SECONDS = 600.0


@dataclass
class Job:
    """A training run under way."""

    process: subprocess.Popen[bytes]
    output: Path
    port: int

    def steps(self) -> list[dict[str, Any]]:
        """Return the steps recorded so far."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.output / "events.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines if line.startswith('{"event": "step"')]
        return []

    def processor_seconds(self) -> float:
        """Return what the supervisor, without its worker, has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Let it save and end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def job(arguments: list[str], folder: Path) -> Iterator[Job]:
    """Start training in an empty folder; stop it in the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "lora_trainer", "train", *arguments]
    command += ["--output_dir", str(folder), "--run_name", "out", "--health_port", str(port)]
    path = f"{TRAINING / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with (folder / "printed.txt").open("wb") as printed:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stdout=printed, stderr=printed
        )
    one = Job(process, folder / "out", port)
    try:
        yield one
    finally:
        if process.poll() is None:
            one.stop()


def ask(port: int) -> int:
    """Return the status code of /health."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def first_answers(arguments: list[str], folder: Path, starts: int) -> list[float]:
    """Return the seconds from process start to the first 200, of several starts."""
    seconds = []
    for _ in range(starts):
        begin = time.perf_counter()
        with job(arguments, folder) as one:
            while True:
                assert one.process.poll() is None, (folder / "printed.txt").read_text()
                with contextlib.suppress(OSError):
                    if ask(one.port) == 200:
                        break
                time.sleep(0.002)
            seconds.append(time.perf_counter() - begin)
    return seconds


def wait_for_steps(one: Job, count: int) -> None:
    """Wait until so many steps are done."""
    until = time.monotonic() + PATIENCE_SECONDS
    while len(one.steps()) < count:
        assert one.process.poll() is None, "the run ended before it was measured"
        assert time.monotonic() < until, "no steps were made"
        time.sleep(0.2)


def health_waits(one: Job, seconds: float) -> list[float]:
    """Return how long each of many questions waited for its answer."""
    waits = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begin = time.perf_counter()
        assert ask(one.port) == 200
        waits.append(time.perf_counter() - begin)
        time.sleep(1 / ASKS_PER_SECOND)
    return waits


def crowd(port: int, seconds: float, used: Any) -> None:
    """Run all the clients for a while, in a separate process."""
    os.nice(19)
    asyncio.run(_crowd(port, seconds))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    used.value = (spent.ru_utime + spent.ru_stime) / seconds


async def _crowd(port: int, seconds: float) -> None:
    clients = [_stream(port) for _ in range(STREAMING)]
    clients += [_drip(port) for _ in range(SLOW // 2)]
    clients += [_leave_unread(port) for _ in range(SLOW // 2)]
    tasks = [asyncio.create_task(client) for client in clients]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, limit=4096)


async def _stream(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await _connected(port)
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while await reader.read(65536):
                pass
            writer.close()
        await asyncio.sleep(1)


async def _drip(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, writer = await _connected(port)
            for letter in b"GET /history HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"x" * 1000:
                writer.write(bytes([letter]))
                await writer.drain()
                await asyncio.sleep(1)
        await asyncio.sleep(1)


async def _leave_unread(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await _connected(port)
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while await reader.read(1):
                await asyncio.sleep(1)
            writer.close()
        await asyncio.sleep(1)


def with_clients(one: Job, seconds: float) -> tuple[float, float, float]:
    """Connect all clients; return begin, end and their share of one CPU core."""
    used = multiprocessing.Value("d", 0.0)
    process = multiprocessing.Process(target=crowd, args=(one.port, seconds, used))
    begin = time.time()
    process.start()
    process.join(seconds + 60)
    return begin + 1.0, begin + seconds, float(used.value)


def speed(steps: list[dict[str, Any]], begin: float, end: float) -> float:
    """Return tokens per second of the steps that lie wholly in a stretch."""
    inside = [
        step
        for step in steps
        if step["time"] - step["step_seconds"] >= begin and step["time"] <= end
    ]
    assert len(inside) >= 3, "the stretches are too short for these steps: --seconds"
    return sum(s["tokens"] for s in inside) / sum(s["step_seconds"] for s in inside)


@dataclass
class Costs:
    """What clients cost: of the speed in each pair, and shares of one processor."""

    pairs: list[float]
    clients: float
    supervisor: dict[bool, float]  # with them and without


def client_costs(one: Job, pairs: int, seconds: float) -> Costs:
    """Return what clients cost."""
    stretches: list[tuple[bool, float, float]] = []
    uses = []
    served: dict[bool, list[float]] = {True: [], False: []}
    for number in range(pairs):
        for has_clients in (False, True) if number % 2 == 0 else (True, False):
            before, since = one.processor_seconds(), time.monotonic()
            if has_clients:
                begin, end, used = with_clients(one, seconds)
                uses.append(used)
            else:
                begin = time.time() + 1.0
                time.sleep(seconds)
                end = time.time()
            share = (one.processor_seconds() - before) / (time.monotonic() - since)
            served[has_clients].append(share)
            stretches.append((has_clients, begin, end))
            assert one.process.poll() is None, "the run ended before it was measured: --steps"
    steps = one.steps()
    costs = []
    for number in range(pairs):
        pair = stretches[2 * number : 2 * number + 2]
        speeds = {has: speed(steps, begin, end) for has, begin, end in pair}
        costs.append(1 - speeds[True] / speeds[False])
    supervisor = {has: statistics.mean(shares) for has, shares in served.items()}
    return Costs(costs, statistics.mean(uses), supervisor)


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean."""
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(values, k=len(values))) for _ in range(4000))
    return means[100], means[3899]


def tiny_job(folder: Path) -> list[str]:
    """Return the arguments of a job on a random two-layer model."""
    sys.path.insert(0, str(TRAINING / "tests"))
    from support.tiny_model import write_model, write_rows

    model = write_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", 0, 256)
    return ["--model_name_or_path", str(model), "--bf16", "false", "--dataset", str(rows),
            "--eval_fraction", "0.1", "--max_seq_length", "128",
            "--per_device_train_batch_size", "32"]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(TRAINING / "config.json"))
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each stretch")
    parser.add_argument("--steps", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = tiny_job(folder) if options.tiny else ["--config", options.config]
        arguments += ["--max_steps", str(options.steps), "--report_to", "", "--save_steps", "0",
                      "--eval_generate", "false"]  # fmt: skip
        first = first_answers(arguments, folder, options.starts)
        print(f"first    median {statistics.median(first):.3f} s, slowest {max(first):.3f} s")
        with job(arguments, folder) as one:
            wait_for_steps(one, SETTLING_STEPS)
            waits = sorted(health_waits(one, options.seconds))
            p99 = waits[int(0.99 * len(waits))]
            print(f"health   p50 {waits[len(waits) // 2] * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, "
                  f"slowest {waits[-1] * 1e3:.1f} ms, of {len(waits)}")  # fmt: skip
            costs = client_costs(one, options.pairs, options.seconds)
        low, high = interval(costs.pairs)
        print(f"clients  {statistics.mean(costs.pairs):.2%} of the speed ({low:.2%} to {high:.2%});"
              f" of a processor they took {costs.clients:.1%}, the supervisor"
              f" {costs.supervisor[True]:.2%}, {costs.supervisor[False]:.2%} alone")  # fmt: skip
    print(json.dumps({"first_seconds": first, "health_p99_seconds": p99,
                      "client_costs": costs.pairs, "client_processor_share": costs.clients,
                      "supervisor_processor_share": list(costs.supervisor.values()),
                      "cores": os.cpu_count()}))  # fmt: skip


if __name__ == "__main__":
    main()
