"""A run as text: log lines, closing tables, and number formats."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..run import events
from ..run.events import Event
from ..run.status import ENDINGS, KEPT_CHARACTERS, RunStatus
from ..units import duration, number, percent, size
from .tensorboard import tensorboard_command
from .terminal import clean, one_line

Line = tuple[str, str]  # text, rich style


def lasting_line(event: Event, status: RunStatus) -> Line | None:
    """Return the line, with its style, that stays in the log for the event, or None."""
    match event:
        case events.RunStarted():
            again = f" (attempt {event.attempt})" if event.attempt else ""
            return f"run {one_line(event.run_name)} in {_absolute(event.output_dir)}{again}", "bold"
        case events.PhaseChanged(phase=phase, detail=detail):
            # Between the steps these have lines of their own: the evaluation's, the checkpoint's.
            if phase in ENDINGS or (status.is_training and status.step > 0):
                return None
            return phase + (f": {one_line(detail)}" if detail else ""), "cyan"
        case events.Planned():
            return _plan_line(status), ""
        case events.Evaluated():
            best = ", the best" if status.best_eval is event and len(status.bests) > 1 else ""
            return (
                f"eval at step {event.step}: loss {number(event.eval_loss)}, perplexity "
                f"{number(event.eval_perplexity)}, token accuracy "
                f"{percent(event.eval_token_accuracy)}, {event.eval_seconds:.1f} s{best}"
            ), "blue"
        case events.Generated():
            return (
                f"held-out answers {event.when} training: {_exact(event)} exact, "
                f"{event.seconds:.1f} s"
            ), "blue"
        case events.CheckpointSaved():
            best = ", the best" if event.is_best else ""
            return (
                f"checkpoint at step {event.step}: {one_line(event.path)}, {size(event.bytes)}, "
                f"{event.seconds:.1f} s{best}"
            ), "green"
        case events.Resumed():
            skipped = ", ".join(map(one_line, event.skipped))
            unsound = f"; skipped damaged checkpoints: {skipped}" if skipped else ""
            return f"resumed at step {event.step} from {one_line(event.path)}{unsound}", "green"
        case events.Warned():
            # Only the first of its kind, and none beyond those that the status keeps.
            kept = event.message[:KEPT_CHARACTERS]
            is_new = any(known.message == kept and known.count == 1 for known in status.warnings)
            return (f"warning: {one_line(event.message)}", "yellow") if is_new else None
        case events.Restarted():
            code = f"exit code {event.exit_code}"
            return f"restart {event.attempt}: {one_line(event.cause)} ({code})", "yellow"
        case events.Failed():
            what = "; ".join(one_line(problem.get("what", "")) for problem in event.problems)
            return f"failed: {what}", "bold red"
        case events.Finished():
            return f"finished {event.step} steps in {duration(event.train_seconds)}", "bold green"
        case events.Stopped():
            saved = f", saved at step {event.step}" if event.step else ""
            return f"stopped by {one_line(event.signal)}{saved}", "yellow"
        case _:
            return None


def closing_lines(status: RunStatus, width: int = 80) -> Iterator[Line]:
    """Yield the lines after a finished run: the before/after table, samples, results, totals."""
    yield from _table(status)
    yield from _samples(status, max(20, min(width, 100)))
    done = status.finished
    if done is None:
        return
    if done.results:
        yield "", ""
        yield "results", "bold"
        for result in done.results:
            yield f"  {_absolute(str(Path(status.output_dir) / result))}", ""
    for line in tensorboard_command(Path(status.output_dir)):
        yield clean(line, 4096), ""
    speed, gpu = status.mean_tokens_per_second, status.peak_gpu_memory_bytes
    totals = [
        f"{total_time(status)}, {duration(done.train_seconds)} training",
        f"{speed:,.0f} tokens/s" if speed else "",
        f"{done.tokens_seen:,} tokens",
        f"peak memory {size(status.peak_memory_bytes)}" if status.peak_memory_bytes else "",
        f"peak GPU memory {size(gpu)}" if gpu else "",
    ]
    yield "", ""
    for text in flowed([total for total in totals if total], width, ", "):
        yield text, "bold"


def total_time(status: RunStatus) -> str:
    """Return the time that a run took, and apart from it what passed between its starts."""
    paused = status.paused_seconds
    pauses = f" (and {duration(paused)} paused between starts)" if paused >= 1 else ""
    return f"{duration(status.elapsed_seconds)} in total{pauses}"


def _table(status: RunStatus) -> Iterator[Line]:
    generated = [status.generated_before, status.generated_after]
    last = status.last_eval if status.last_eval is not status.eval_before else None
    evals = [status.eval_before, last]
    rows: list[tuple[str, list[str | None]]] = [
        ("exact match", [_exact(g) if g else None for g in generated]),
        ("eval loss", [number(e.eval_loss) if e else None for e in evals]),
        ("perplexity", [number(e.eval_perplexity) if e else None for e in evals]),
        ("token accuracy", [percent(e.eval_token_accuracy) if e else None for e in evals]),
    ]
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return
    rows.insert(0, ("held-out rows", ["before", "after"]))
    columns = [2 + max(len(row[1][side] or "-") for row in rows) for side in (0, 1)]
    yield "", ""
    for name, cells in rows:
        shown = "".join(f"{cells[side] or '-':>{columns[side]}}" for side in (0, 1))
        yield f"{name:<15}{shown}", "bold" if name == "held-out rows" else ""


def _samples(status: RunStatus, width: int) -> Iterator[Line]:
    answers = {(sample.index, sample.when): sample for sample in status.samples}
    for index in sorted({index for index, _ in answers}):
        before, after = answers.get((index, "before")), answers.get((index, "after"))
        shown = after or before
        assert shown is not None
        yield "", ""
        yield f"held-out sample {index + 1}", "bold"
        texts = [("prompt", shown.prompt), ("expected", shown.expected)]
        texts += [("before", before.answer)] if before else []
        texts += [("after", after.answer)] if after else []
        for name, text in texts:
            indent = " " * 11
            wrapped = textwrap.wrap(
                clean(text), width - 1, initial_indent=indent, subsequent_indent=indent
            )
            first, *others = wrapped or [indent + "(empty)"]
            yield f"  {name:<9}{first[11:]}", "green" if name == "after" else ""
            for other in others:
                yield other, "green" if name == "after" else ""


def figures(status: RunStatus) -> list[str]:
    """Return the figures of the last step in the order of their weight."""
    latest = status.latest
    if latest is None:
        return []
    speed, left = status.tokens_per_second, status.eta_seconds
    memory = latest.gpu_memory_bytes or latest.memory_bytes
    peak = status.peak_gpu_memory_bytes or status.peak_memory_bytes
    higher = f" (peak {size(peak)})" if peak > 1.05 * memory else ""
    shown = [
        f"loss {number(latest.loss)}",
        f"lr {latest.learning_rate:.2e}" if latest.learning_rate else _zero_rate(status),
        f"{speed:,.0f} tokens/s" if speed else "",
        f"{'GPU ' if latest.gpu_memory_bytes else ''}memory {size(memory)}{higher}",
        f"{duration(left)} left" if left is not None else "",
    ]
    return [figure for figure in shown if figure]


def _zero_rate(status: RunStatus) -> str:
    """Explain the first step of a warmup, as transformers has it: the rate begins at 0."""
    return "lr 0 (the warmup begins at 0)" if status.step == 1 else "lr 0"


def steps_done(status: RunStatus) -> str:
    """Return the steps done and, where known, planned."""
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def work_done(progress: events.Progress) -> str:
    """Return how far the work has come, in its unit."""
    unit = one_line(progress.unit)
    counts = [progress.done, progress.total] if progress.total > 0 else [progress.done]
    if unit == "bytes":
        return " of ".join(size(count) for count in counts)
    return " of ".join(f"{count:,}" for count in counts) + (f" {unit}" if unit else "")


def sparkline(values: list[float], is_unicode: bool = True) -> str:
    """Return a line of bars as high as the values; "!" for one that is not finite."""
    bars = "▁▂▃▄▅▆▇█" if is_unicode else "_.-=+*#"
    finite = [value for value in values if abs(value) < float("inf")]
    low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    return "".join(
        "!" if not abs(v) < float("inf") else bars[int((v - low) / (span or 1) * (len(bars) - 1))]
        for v in values
    )


def flowed(phrases: list[str], width: int, separator: str) -> Iterator[str]:
    """Yield the parts joined into rows that fit the width."""
    row = ""
    for phrase in phrases:
        if row and len(row) + len(separator) + len(phrase) > width:
            yield row
            row = ""
        row += (separator if row else "") + phrase
    if row:
        yield row


def _exact(generated: events.Generated) -> str:
    return (
        f"{round(generated.exact_match * generated.rows)}/{generated.rows} = "
        f"{percent(generated.exact_match)}"
    )


def _plan_line(status: RunStatus) -> str:
    plan = status.plan
    phrases = [f"{status.total_steps:,} steps"]
    if examples := status.planned("step_examples"):
        phrases[0] += f" of {one_line(str(plan.get('batch', f'{examples:,} examples')))}"
    if trainable := status.planned("trainable_parameters"):
        phrases.append(f"{trainable:,} trainable parameters")
    if plan.get("device"):
        phrases.append(one_line(f"{plan.get('precision', '')} on {plan['device']}"))
    return "plan: " + ", ".join(phrases)


def _absolute(path: str) -> str:
    return clean(str(Path(path).absolute()), 4096)
