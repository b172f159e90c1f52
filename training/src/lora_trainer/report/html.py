"""Create the report of a run, `report.html` and `loss.png`, from the files in its folder.

It reads `events.jsonl`, `config.resolved.json`, `plan.json`, `environment.json` and
`data.json`, each of which may be missing, and works as well for a run that failed or
is not finished. The page is one file that loads nothing and runs no script; charts are
drawn by its template from shares (0 to 1) of the plot, so that they fit every width.
The same inputs give the same bytes. Imports no torch; matplotlib only for the picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import MEANINGS
from ..host.disk import write_bytes
from ..run.history import KEPT_MOMENTS, WHOLE, History, Point
from ..run.status import ENDINGS, RunStatus
from ..run.summary import read_run
from ..run_folder import RunFolder
from ..units import duration, percent, size
from .charts import Vertex, chart, draw_png, short, smoothed
from .text import total_time

LONGEST_TEXT = 6000
NAMELESS = "Training run"
LINKED = (f"{RunFolder.final_model}/README.md", RunFolder.results, RunFolder.events, RunFolder.log)


def write_report(output_dir: Path) -> list[Path]:
    """Write `report.html` and, when a step was done, `loss.png`; return what was written."""
    status, history = read_run(output_dir, WHOLE)
    written = [RunFolder(output_dir).report]
    page = render_html(
        status,
        history,
        config=read_json(RunFolder(output_dir).resolved),
        plan=read_json(RunFolder(output_dir).plan),
        environment=read_json(RunFolder(output_dir).environment),
        data=read_json(RunFolder(output_dir).data),
        links=[name for name in LINKED if (output_dir / name).is_file()],
    )
    # Generated text may hold half of a surrogate pair, which UTF-8 cannot.
    write_bytes(written[0], page.encode("utf-8", errors="replace"))
    if series(history, lambda point: point.loss):
        written.append(RunFolder(output_dir).loss_chart)
        write_bytes(written[1], _picture(status, history))
    return written


def render_html(
    status: RunStatus,
    history: History,
    *,
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    links: Sequence[str] = (),
) -> str:
    """Return the page; every text of the run in it is escaped."""
    page = page_template("template.html")
    values = [(s, k, leaf) for s, group in config.items() for k, leaf in group.items()]
    settings = [(s, k, _text(leaf["value"]), str(leaf["origin"])) for s, k, leaf in values]
    base = _value(config, "model", "model_name_or_path") or ""
    start = _value(config, "lora", "adapter_name_or_path") or ""
    failure, best = status.failure, status.best_eval
    exit_code = failure.exit_code if failure and status.exit_code is None else status.exit_code
    return page.render(
        name=status.run_name or NAMELESS,
        base=base,
        start=start,
        before="starting adapter" if start else "base model",
        digest=status.config_digest,
        started=moment(status.started_time),
        result=status.phase if status.phase in ENDINGS else "unfinished",
        phase="" if status.started_time is None else status.phase,
        exit_code=exit_code,
        meaning=MEANINGS.get(exit_code or 0, "unknown"),
        tiles=_tiles(status, history, plan),
        problems=failure.problems if failure else [],
        warnings=_warnings(status, history),
        comparison=_comparison(status),
        best=(best.step, best.eval_loss) if best else None,
        samples=_samples(history),
        charts=_charts(history),
        timeline=_timeline(status, history),
        changed=[row for row in settings if not row[3].startswith("default")],
        unchanged=[row for row in settings if row[3].startswith("default")],
        plan=_flat(plan),
        environment=_flat(environment),
        data=_flat(data),
        checkpoints=_checkpoints(history),
        links=links,
    )


def page_template(name: str) -> Any:
    """Return a page's template; every text that it is given is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lora_trainer", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def _value(config: Mapping[str, Any], section: str, leaf: str) -> Any:
    return config.get(section, {}).get(leaf, {}).get("value")


def _checkpoints(history: History) -> list[tuple[int, str, str, str, bool]]:
    """Return the rows of the table; the last that was the best when it was saved still is."""
    every = history.checkpoints()
    best = max((saved.step for saved in every if saved.is_best), default=None)
    return [
        (saved.step, saved.path, size(saved.bytes), f"{saved.seconds:.2f} s", saved.step == best)
        for saved in every
    ]


def _tiles(
    status: RunStatus, history: History, plan: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Return the summary: name, figure, what it is of."""
    steps = history.points(WHOLE)
    if not steps:
        return []
    last, total = steps[-1], plan.get("total_steps")
    seconds = sum(step.seconds for step in steps)
    done = f"{last.step:,} of {total:,}" if total else f"{last.step:,}"
    tokens = sum(step.tokens for step in steps)
    speed = f"{tokens / seconds:,.0f} tokens/s" if seconds else "not measured"
    memory, on_gpu = status.peak_memory_bytes, status.peak_gpu_memory_bytes
    kind = f"of the GPU; {size(memory)} main" if on_gpu else "main memory"
    trained_for = duration(status.finished.train_seconds if status.finished else seconds)
    losses = [loss for _, loss in series(history, lambda point: point.loss)]
    latest = losses[-max(1, len(losses) // 20) :]
    loss = short(sum(latest) / len(latest)) if latest else "not finite"
    over = f"mean of the last {len(latest)} steps" if len(latest) > 1 else "of the last step"
    return [
        ("Training time", trained_for, total_time(status)),
        ("Steps", done, f"{last.epoch:.2f} epochs"),
        ("Speed", speed, f"{tokens:,} tokens"),
        ("Peak memory", size(on_gpu or memory), kind),
        ("Training loss", loss, over),
    ]


def _warnings(status: RunStatus, history: History) -> list[tuple[str, int]]:
    """Return the warnings, and how often each was given; a loss that is not finite is one."""
    warnings = [(warning.message, warning.count) for warning in status.warnings]
    if status.warnings_left_out:
        warnings.append((f"{status.warnings_left_out} more warnings are not shown", 1))
    steps = [point.step for point in history.points(WHOLE) if not math.isfinite(point.loss)]
    if steps:
        more = f" and at {len(steps) - 1} later steps" if steps[1:] else ""
        warnings.append((f"The loss was not finite at step {steps[0]}{more}", 1))
    return warnings


def _comparison(status: RunStatus) -> list[tuple[str, str, str, str, bool]]:
    """Return the table of before and after: name, both figures, change, is it better."""
    before, after = status.generated_before, status.generated_after
    first, last = status.eval_before, status.last_eval
    last = last if last is not first else None
    rows = max((shown.rows for shown in (before, after) if shown), default=0)
    figures = (
        (f"Exact match, {rows} rows", before, after, "exact_match", True),
        ("Evaluation loss", first, last, "eval_loss", False),
        ("Perplexity", first, last, "eval_perplexity", False),
        ("Token accuracy", first, last, "eval_token_accuracy", True),
    )
    return [
        _compared(name, getattr(old, key, None), getattr(new, key, None), is_fraction=is_fraction)
        for name, old, new, key, is_fraction in figures
        if old or new
    ]


def _compared(
    name: str, old: float | None, new: float | None, *, is_fraction: bool
) -> tuple[str, str, str, str, bool]:
    """Return a row of the table; of a share more is better, of a loss less."""
    shown = percent if is_fraction else partial(short, digits=4)  # a perplexity is 1.004, not 1
    texts = ["not measured" if value is None else shown(value) for value in (old, new)]
    if old is None or new is None or not math.isfinite(new - old):
        return name, texts[0], texts[1], "", False
    change = f"{100 * abs(new - old):.1f} points" if is_fraction else shown(abs(new - old))
    sign = "+" if new >= old else "\u2212"
    return name, texts[0], texts[1], sign + change, new > old if is_fraction else new < old


def _samples(history: History) -> list[dict[str, Any]]:
    shown = []
    for index in sorted({index for index, _ in history.samples}):
        pair = [history.samples.get((index, when)) for when in ("before", "after")]
        either = pair[1] or pair[0]
        assert either is not None
        answers = [
            None if one is None else (_cut(one.answer), one.answer.strip() == one.expected.strip())
            for one in pair
        ]
        shown.append({"prompt": _cut(either.prompt), "expected": _cut(either.expected),
                      "before": answers[0], "after": answers[1]})  # fmt: skip
    return shown


def _timeline(status: RunStatus, history: History) -> list[tuple[str, str, str]]:
    entries = [
        (duration(_since_start(status, moment.time)), moment.kind, moment.text)
        for moment in history.timeline
    ]
    if history.moments_left_out:
        gap = f"{history.moments_left_out} entries are not shown"
        entries.insert(KEPT_MOMENTS // 2, ("", "gap", gap))
    return entries


def _charts(history: History) -> list[dict[str, Any]]:
    """Return the charts' geometry; the first one is the wide one."""
    loss = series(history, lambda point: point.loss)
    norm = series(history, lambda point: point.grad_norm)
    rate = series(history, lambda point: point.learning_rate)
    speed = series(history, lambda point: point.tokens_per_second)
    none: list[Vertex] = []
    plots = (
        ("Loss", loss, smoothed(loss), held_out_loss(history)),
        ("Learning rate", rate, none, none),
        ("Gradient norm", norm, smoothed(norm), none),
        ("Tokens per second", speed, smoothed(speed), none),
    )
    return [
        chart(title, raw, smooth, dots, history.resumes)
        for title, raw, smooth, dots in plots
        if raw or dots
    ]


def _picture(status: RunStatus, history: History) -> bytes:
    return draw_png(
        status.run_name or NAMELESS,
        loss=series(history, lambda point: point.loss),
        held_out=held_out_loss(history),
        rate=series(history, lambda point: point.learning_rate),
        resumed_steps=history.resumes,
    )


def series(history: History, figure: Callable[[Point], float | None]) -> list[Vertex]:
    """Return a figure of every step, without those that are not finite."""
    values = [(float(point.step), figure(point)) for point in history.points(WHOLE)]
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def held_out_loss(history: History) -> list[Vertex]:
    """Return the evaluation loss by step, as far as it is finite."""
    points = [(float(score.step), score.eval_loss) for score in history.evals()]
    return [point for point in points if math.isfinite(point[1])]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, nothing if it is missing or was never finished."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}.")
        else:
            shown = _text(value)
            if isinstance(value, int) and not isinstance(value, bool):
                shown = size(value) if name.endswith("_bytes") else f"{value:,}"
            rows.append((above + name, shown))
    return rows


def _text(value: object) -> str:
    """Return a JSON value as a reader wants it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        texts = [_text(item) for item in value]
        return ("\n" if any(" " in text for text in texts) else ", ").join(texts) or "none"
    if isinstance(value, list | dict):
        return _cut(json.dumps(value, ensure_ascii=False))
    return "none" if value is None else _cut(str(value))


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]}\u2026 ({more:,} characters more)"


def _since_start(status: RunStatus, moment: float | None) -> float:
    return 0.0 if status.started_time is None or moment is None else moment - status.started_time


def moment(seconds: float | None) -> str:
    """Return a time since the epoch as text; nothing for none."""
    if not seconds:
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
