"""Several runs beside each other: final figures, the keys that differ, curves on common axes.

Figures on held-out rows are only compared fairly where the rows are the same, which the digests
in `data.json` say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.history import WHOLE, History, stretches
from ..run.summary import RunSummary, read_run, summarize
from ..run_folder import RunFolder
from ..units import duration, number, percent, size
from .charts import overlay, short, smoothed
from .html import held_out_loss, moment, page_template, read_json, series
from .terminal import one_line, shortened
from .text import sparkline

# Two runs differ in these by nature.
NAMES = frozenset({"run_name", "output_dir"})
DATA = "data.json"
SPARKS = 40
WIDEST = 36
MISSING = "-"
Row = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run was given: its configuration, and what its data came to."""

    config: dict[str, Any]
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ComparedRun(RunFacts):
    """A run with all that is compared of it."""

    summary: RunSummary
    history: History

    @property
    def name(self) -> str:
        """Return the name that it is compared under."""
        return self.summary.name


def read_compared(name: str, folder: Path) -> ComparedRun:
    """Read a run from its folder."""
    _, history = read_run(folder, WHOLE)
    facts = read_facts(folder)
    return ComparedRun(facts.config, facts.data, summarize(name, folder), history)


def read_facts(folder: Path) -> RunFacts:
    """Read what a run was given."""
    return RunFacts(read_json(RunFolder(folder).resolved), read_json(folder / DATA))


def figures(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return the rows of the table of figures; one that no run has is left out."""
    rows: tuple[tuple[str, Callable[[RunSummary], str]], ...] = (
        ("state", state),
        ("steps", steps),
        ("first loss", lambda run: _number(run.first_loss)),
        ("last loss", lambda run: _number(run.last_loss)),
        ("eval loss before", lambda run: _number(run.eval_loss_before)),
        ("eval loss", lambda run: _number(run.eval_loss)),
        ("best eval loss", _best),
        ("exact match before", lambda run: _percent(run.exact_match_before)),
        ("exact match", lambda run: _percent(run.exact_match)),
        ("tokens/s", lambda run: f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else ""),
        ("peak memory", lambda run: size(run.peak_memory_bytes) if run.peak_memory_bytes else ""),
        ("time", lambda run: duration(run.seconds)),
        ("started", lambda run: moment(run.started_time)),
    )
    table = [(title, [show(run.summary) or MISSING for run in runs]) for title, show in rows]
    return [row for row in table if set(row[1]) != {MISSING}]


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys that are not the same in all runs, with each one's value; None: not set."""
    leaves = [
        {key: cell.get("value") for section in config.values() for key, cell in section.items()}
        for config in configs
    ]
    names = dict.fromkeys(key for values in leaves for key in values if key not in NAMES)
    table = {key: [values.get(key) for values in leaves] for key in names}
    return {key: row for key, row in table.items() if any(value != row[0] for value in row)}


def notes(runs: Sequence[RunFacts]) -> list[str]:
    """Return what makes a comparison unfair."""
    if len({_held_out_rows(run) for run in runs} - {""}) > 1:
        return ["the held-out rows differ: evaluation figures of these runs are not comparable"]
    return []


def _held_out_rows(run: RunFacts) -> str:
    """Return what identifies the held-out rows: those of a share follow from data and seed."""
    if held_out := run.data.get("eval"):
        return str(held_out.get("digest", ""))
    leaves = {key: cell.get("value") for leaf in run.config.values() for key, cell in leaf.items()}
    fraction, digest = leaves.get("eval_fraction"), (run.data.get("train") or {}).get("digest")
    return f"{fraction} of {digest}, seed {leaves.get('seed')}" if fraction and digest else ""


def comparison_lines(runs: Sequence[ComparedRun], *, is_unicode: bool) -> Iterator[str]:
    """Yield the comparison as text for a terminal."""
    yield from table(["", *(run.name for run in runs)], figures(runs))
    keys = differing_keys([run.config for run in runs])
    yield ""
    if keys:
        rows = [(key, [_value(value) for value in values]) for key, values in keys.items()]
        yield from table(["keys that differ", *(run.name for run in runs)], rows)
    else:
        yield "no key differs"
    lines = list(_sparklines(runs, is_unicode=is_unicode))
    if lines:
        yield from ("", "loss, on one scale", *lines)
    yield from (f"note: {note}" for note in notes(runs))


def to_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Return the comparison as values of JSON."""
    return {
        "runs": [run.summary.to_json() for run in runs],
        "differing_keys": differing_keys([run.config for run in runs]),
        "notes": notes(runs),
    }


def comparison_html(runs: Sequence[ComparedRun]) -> str:
    """Return the comparison as one page that loads nothing and runs no script."""
    keys = differing_keys([run.config for run in runs])
    rows = [(key, [_value(value, 400) for value in values]) for key, values in keys.items()]
    page: str = page_template("comparison.html").render(
        names=[run.name for run in runs],
        figures=figures(runs),
        keys=rows,
        notes=notes(runs),
        charts=list(_charts(runs)),
    )
    return page


def table(head: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table whose columns are as wide as their widest cell."""
    lines = [[one_line(cell) for cell in head]]
    lines += [[one_line(cell) for cell in (name, *cells)] for name, cells in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def state(run: RunSummary) -> str:
    """Return a run's state, with the exit code of one that failed."""
    return f"failed ({run.exit_code})" if run.state == "failed" and run.exit_code else run.state


def steps(run: RunSummary) -> str:
    """Return the steps done and, where known, planned."""
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _sparklines(runs: Sequence[ComparedRun], *, is_unicode: bool) -> Iterator[str]:
    """Yield each run's loss over its steps, low bars for low losses in all of them."""
    curves = {run.name: _thinned([y for _, y in _loss(run)]) for run in runs}
    every = [value for curve in curves.values() for value in curve]
    width = max(map(len, curves))
    for name, curve in curves.items():
        if curve:
            # The first two of the line set its scale and are cut off again.
            line = sparkline([min(every), max(every), *curve], is_unicode)[2:]
            shown = one_line(name).ljust(width)
            yield f"{shown}  {line.ljust(SPARKS)}  {short(curve[0])} to {short(curve[-1])}"


def _thinned(values: list[float]) -> list[float]:
    """Return at most so many means of neighbours."""
    count = min(SPARKS, len(values))
    return [sum(part) / len(part) for part in stretches(values, count)] if count else []


def _charts(runs: Sequence[ComparedRun]) -> Iterator[dict[str, Any]]:
    plots: tuple[tuple[str, Callable[[ComparedRun], list[tuple[float, float]]]], ...] = (
        ("Loss", lambda run: smoothed(_loss(run))),
        ("Evaluation loss", lambda run: held_out_loss(run.history)),
        ("Learning rate", lambda run: series(run.history, lambda point: point.learning_rate)),
        ("Gradient norm", lambda run: smoothed(series(run.history, lambda p: p.grad_norm))),
    )
    for title, curve in plots:
        curves = {run.name: curve(run) for run in runs}
        if any(curves.values()):
            yield overlay(title, curves)


def _loss(run: ComparedRun) -> list[tuple[float, float]]:
    return series(run.history, lambda point: point.loss)


def _best(run: RunSummary) -> str:
    loss = run.best_eval_loss
    return "" if loss is None else f"{number(loss)} (step {run.best_step})"


def _number(value: float | None) -> str:
    return "" if value is None else number(value) if math.isfinite(value) else "not finite"


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _value(value: object, limit: int = WIDEST) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return _value(", ".join(map(str, value)) or "none", limit)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if text.startswith("/") and len(text) > limit:  # paths differ at their end
        return "..." + text[3 - limit :]
    return shortened(text, limit)
