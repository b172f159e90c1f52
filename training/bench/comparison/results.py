"""Results of a comparison: medians and spreads, as JSON, as a table and as a picture."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .environments import PEERS
from .job import IGNORED, Job

MEASURES = {
    "tokens_per_second": ("tokens/s", 1.0),
    "supervised_tokens_per_second": ("supervised/s", 1.0),
    "above_loaded_bytes": ("GB above the model", 1e-9),
    "peak_bytes": ("GB at the peak", 1e-9),
    "largest_batch_tokens": ("largest micro-batch", 1.0),
    "seconds_to_first_step": ("s to the first step", 1.0),
}
COLOURS = ("#2563eb", "#98a1b0", "#d9730d", "#e0a458")
ROOT = Path(__file__).resolve().parents[3]


def description(job: Job) -> dict[str, int]:
    """Return what a job's rows are."""
    examples = job.examples()
    lengths = [len(one["input_ids"]) for one in examples]
    return {
        "rows": len(examples),
        "step_rows": job.step_rows,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "supervised": sum(label != IGNORED for one in examples for label in one["labels"][1:]),
    }


def document(
    jobs: dict[str, dict[str, Any]],
    imports: list[float],
    ours: str,
) -> dict[str, Any]:
    """Return everything measured, with medians, spreads, and ratios to this project."""
    for job in jobs.values():
        job["median"] = {
            name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            for name, runs in job["contestants"].items()
        }
        mine = job["median"][ours]
        job["share_of_limit"] = job["limit"]["step_seconds"] / mine["step_seconds"]
        job["ratios"] = {
            name: {
                "speed": mine["tokens_per_second"] / theirs["tokens_per_second"],
                "memory": mine["above_loaded_bytes"] / theirs["above_loaded_bytes"],
            }
            for name, theirs in job["median"].items()
            if name != ours
        }
        begin = statistics.median(imports)
        job["first_step_over_imports"] = mine["seconds_to_first_step"] / begin
    return {
        "commit": _commit(),
        "machine": _machine(),
        "ours": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "peers": list(PEERS),
        "import_seconds": imports,
        "jobs": jobs,
    }


def table(document: dict[str, Any]) -> str:
    """Return the medians as Markdown; in brackets the least and the largest."""
    lines = []
    for name, job in document["jobs"].items():
        about = job["job"]
        lines += [
            f"{name}: {about['rows']} rows, {about['tokens']:,} tokens, {about['supervised']:,} "
            f"of them supervised, the longest row {about['longest']}",
            "",
            "| | " + " | ".join(title for title, _ in MEASURES.values()) + " |",
            "|---" * (len(MEASURES) + 1) + "|",
        ]
        for contestant, runs in job["contestants"].items():
            cells = [_cell([run[key] * unit for run in runs])
                     for key, (_, unit) in MEASURES.items()]  # fmt: skip
            lines.append(f"| {contestant} | " + " | ".join(cells) + " |")
        lines += ["", *_summary(job), ""]
    return "\n".join(lines)


def _summary(job: dict[str, Any]) -> list[str]:
    limit = job["limit"]
    lines = [
        f"against {name}: {ratio['speed']:.2f} times the speed, "
        f"{ratio['memory']:.0%} of the memory above the model"
        for name, ratio in job["ratios"].items()
    ]
    return [
        *lines,
        f"share of the matrix-product limit ({limit['tokens_per_second']:.0f} tokens/s, "
        f"{limit['operations_per_second'] / 1e9:.0f} GFLOP/s): {job['share_of_limit']:.2f}",
        f"time to the first step over that of the imports: {job['first_step_over_imports']:.2f}",
    ]


def _cell(values: list[float]) -> str:
    digits = 0 if statistics.median(values) >= 100 else 1 if statistics.median(values) >= 10 else 2
    middle = f"{statistics.median(values):,.{digits}f}"
    if min(values) == max(values):
        return middle
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw speed and memory of each job: a bar for the median, a line for the spread."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = ("tokens_per_second", "above_loaded_bytes")
    jobs = document["jobs"]
    figure, axes = pyplot.subplots(
        len(jobs), len(shown), figsize=(8, 2.2 * len(jobs)), squeeze=False, layout="constrained"
    )
    for row, (name, job) in zip(axes, jobs.items(), strict=True):
        for axis, key in zip(row, shown, strict=True):
            title, unit = MEASURES[key]
            runs = job["contestants"]
            values = [[one[key] * unit for one in of] for of in runs.values()]
            middles = [statistics.median(of) for of in values]
            spread = [
                [abs(end(of) - middle) for of, middle in zip(values, middles, strict=True)]
                for end in (min, max)
            ]
            axis.barh(list(runs), middles, xerr=spread, color=COLOURS, height=0.6)
            axis.invert_yaxis()
            axis.set_title(f"{name}: {title}", fontsize=9, loc="left")
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            if key == "tokens_per_second":
                axis.axvline(job["limit"]["tokens_per_second"], color="#333", linestyle=":")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": ", ".join(sorted(models)),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }
