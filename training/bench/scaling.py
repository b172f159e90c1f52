"""Speed and memory of a step against length, batch, rank, vocabulary and width.

    python bench/scaling.py [--curves batch,rank] [--repeats 3] [--out FOLDER]

A small Llama with random weights is trained by a run's own session and loop, in float32 on one
thread. Each curve changes one size and keeps the others; along `length` a step's tokens stay the
same. Speed is in tokens per CPU second, which other work on the machine moves less than the time on
the clock. Memory is how far the steps rise above the loaded model. Writes scaling.json and
scaling.png, and prints how each curve grows from its first point to its last. Results are in
docs/decisions/0031.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from comparison import ours
from comparison.job import Job
from gpu_check.models import write_folder
from gpu_check.scale import Shape

M_MMAP_THRESHOLD, MAPPED_FROM_BYTES = -3, 256 << 10
STEPS = 3


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement; `length` in tokens, `batch` in examples."""

    length: int = 128
    batch: int = 8
    rank: int = 16
    vocabulary: int = 4096
    width: int = 256


BASE = Point()
CURVES: dict[str, list[Point]] = {
    "length": [replace(BASE, length=n, batch=2048 // n) for n in (64, 128, 256, 512)],
    "batch": [replace(BASE, batch=n) for n in (8, 16, 32, 64)],
    "rank": [replace(BASE, rank=n) for n in (4, 8, 16, 32)],
    "vocabulary": [replace(BASE, vocabulary=n) for n in (4096, 8192, 16_384, 32_768)],
    "width": [replace(BASE, width=n) for n in (128, 256, 512)],
}


def rows(point: Point) -> list[dict[str, Any]]:
    """Return chat rows that are cut to the point's length; a token is a byte."""
    question = {"role": "user", "content": "Go on."}
    return [
        {"messages": [question, {"role": "assistant", "content": f"{n:06} " * point.length}]}
        for n in range(point.batch * STEPS)
    ]


def measure(point: Point, repeats: int) -> dict[str, float]:
    """Return tokens per CPU second, and how many bytes the steps rise above the loaded model."""
    shape = Shape(point.width, point.width * 11 // 4, 4, 4, 2, point.vocabulary, True)
    speeds, rises = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = write_folder(Path(folder) / "model", shape, device="cpu", dtype=torch.float32)
        job = Job("point", str(Path(folder) / "job"), str(model), point.rank, point.batch,
                  point.length)  # fmt: skip
        ours.prepare(job, rows(point))
        assert {len(one["input_ids"]) for one in job.examples()} == {point.length}
        for repeat in range(repeats):
            record = ours.train_here(job, Path(folder) / str(repeat))
            speeds.append(STEPS * point.batch * point.length / record.cpu_seconds)
            rises.append(record.peak_bytes - record.loaded_bytes)
    return {"tokens_per_cpu_second": statistics.median(speeds), "bytes": statistics.median(rises)}


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw speed and memory of every curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(curves), figsize=(11, 4), layout="constrained", squeeze=False
    )
    for column, (name, points) in zip(axes.T, curves.items(), strict=True):
        sizes = [str(int(point[name])) for point in points]
        column[0].plot(
            sizes, [point["tokens_per_cpu_second"] for point in points], "o-", color="#2563eb"
        )
        column[1].plot(sizes, [point["bytes"] / 1e6 for point in points], "o-", color="#d9730d")
        column[1].set_xlabel(name)
        for axis in column:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens per CPU second")
    axes[1][0].set_ylabel("MB above the model")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Measure all curves."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the results")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point (3)")
    parser.add_argument("--curves", default=",".join(CURVES), help="which of them (all)")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    # malloc gives a large block back when it is freed.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    measured: dict[Point, dict[str, float]] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    for name in options.curves.split(","):
        for point in CURVES[name]:
            if point not in measured:
                measured[point] = vars(point) | measure(point, options.repeats)
        curves[name] = [measured[point] for point in CURVES[name]]
        first, last = curves[name][0], curves[name][-1]
        print(f"{name} {first[name]} to {last[name]}: "
              f"speed x {last['tokens_per_cpu_second'] / first['tokens_per_cpu_second']:.2f}, "
              f"memory x {last['bytes'] / first['bytes']:.2f}", flush=True)  # fmt: skip
        (out / "scaling.json").write_text(json.dumps(curves, indent=1) + "\n")
    draw(curves, out / "scaling.png")


if __name__ == "__main__":
    main()
