"""Evaluate an adapter on any data: `lora-trainer evaluate RUN --dataset FILE`.

The same rows through the base model and through the adapter: loss, perplexity, token
accuracy, and the share of answers that are exactly the expected ones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..config.schema import Config
from ..report.progress import Meter
from ..units import duration, number, percent
from .finetuned import FinetunedModel, LoadedModel, open_model
from .given_rows import GivenRows, open_rows, spread

NAMES = ("exact_match", "loss", "perplexity", "token_accuracy")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to evaluate on, and how far; 0 rows: all of them."""

    given: GivenRows = field(default_factory=GivenRows)
    rows: int = 0
    has_answers: bool = True
    answer_rows: int = 0
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one model on the rows; `exact_match` is None where no answers were made."""

    loss: float
    perplexity: float | None
    token_accuracy: float
    exact_match: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both models on the same rows; `before` is None where there is no adapter to take away."""

    model: str
    adapter: str | None
    dataset: list[str]
    is_held_out: bool
    rows: int
    questions: int
    trained_tokens: int
    seconds: float
    before: Figures | None
    after: Figures


def compare(
    finetuned: FinetunedModel, wanted: Wanted, *, is_json: bool, output: Path | None
) -> None:
    """Evaluate, and print a table or JSON; write JSON to `output` where it is given.

    Raises:
        DataError, ConfigError: there are no such rows, or they cannot be read.
        UnavailableError, AccessError: the model cannot be had.
    """
    result = _compare(finetuned, wanted)
    text = json.dumps(asdict(result), indent=1)
    if output is not None:
        from ..host.disk import write_text

        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text + "\n")
    if is_json:
        typer.echo(text)
        return
    for line in table(result):
        typer.echo(line)


def table(result: Comparison) -> list[str]:
    """Return the figures as lines, before beside after."""
    columns = [("before", result.before), ("after", result.after)]
    shown = [(title, figures) for title, figures in columns if figures is not None]
    if len(shown) == 1:
        shown = [("", result.after)]
    # Rows that the user names may be among those trained on.
    heading = "held-out rows" if result.is_held_out else "rows"
    lines = [f"{heading:<16}" + "".join(f"{title:>12}" for title, _ in shown)]
    for name in NAMES:
        cells = [_cell(name, getattr(figures, name)) for _, figures in shown]
        if any(cells):
            lines.append(f"{name.replace('_', ' '):<16}" + "".join(f"{cell:>12}" for cell in cells))
    asked = f", {result.questions:,} of them answered" if result.questions else ""
    lines += ["", f"{result.rows:,} rows scored{asked}, {duration(result.seconds)}"]
    return lines


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "infinite" if name == "perplexity" else ""
    return percent(value) if name in ("exact_match", "token_accuracy") else number(value)


def _compare(finetuned: FinetunedModel, wanted: Wanted) -> Comparison:
    import numpy as np

    from ..data.batches import RowView
    from ..model import probe

    start = time.monotonic()
    config, view = open_rows(finetuned, wanted.given)
    if wanted.rows:
        view = RowView(view, np.arange(min(wanted.rows, len(view))))
    typer.echo(f"loading {finetuned.config.model.model_name_or_path} ...", err=True)
    opened = open_model(finetuned)
    probe.verify(opened.causal)
    before = None
    if opened.has_adapter:
        with opened.causal.model.disable_adapter():
            before = _figures(opened, view, config, wanted, "the base model")
    after = _figures(opened, view, config, wanted, "the adapter" if before else "the model")
    return Comparison(
        model=opened.source.name,
        adapter=str(finetuned.adapter) if finetuned.adapter else None,
        dataset=list(wanted.given.dataset) or _named(finetuned.config),
        is_held_out=not wanted.given.dataset,
        rows=len(view),
        questions=after[1],
        trained_tokens=after[2],
        seconds=time.monotonic() - start,
        before=before[0] if before else None,
        after=after[0],
    )


def _figures(
    opened: LoadedModel, rows: Any, config: Config, wanted: Wanted, who: str
) -> tuple[Figures, int, int]:
    """Return the figures, how many questions were answered, and how many tokens were scored."""
    from ..train import evaluate

    batch = config.training.per_device_eval_batch_size
    with Meter(f"scoring with {who}", len(rows), "rows") as meter:
        score = evaluate.score(
            opened.causal,
            rows,
            batch_examples=batch,
            is_by_tokens=config.training.max_tokens_per_micro_batch != 0,
            progress=meter.update,
        )
    assert score is not None, "nothing asked it to stop"
    exact, every = None, evaluate.questions(rows) if wanted.has_answers else []
    asked = spread(every, wanted.answer_rows)
    if asked:
        if len(asked) < len(every):
            typer.echo(
                f"answers are generated for {len(asked):,} of {len(every):,} rows, spread evenly; "
                "--answer-rows 0 answers all",
                err=True,
            )
        with Meter(f"answering with {who}", len(asked), "prompts") as meter:
            answers = evaluate.answer(
                opened.causal,
                opened.tokenizer,
                asked,
                ends=opened.stops,
                batch_examples=batch,
                max_new_tokens=wanted.max_new_tokens or config.training.eval_max_new_tokens,
                progress=meter.update,
                advance=meter.advance,
            )
        assert answers is not None, "nothing asked it to stop"
        exact = sum(one.is_exact for one in answers) / len(answers)
    perplexity = score.perplexity if math.isfinite(score.perplexity) else None
    figures = Figures(score.loss, perplexity, score.token_accuracy, exact)
    return figures, len(asked), score.targets


def _named(config: Config) -> list[str]:
    """Return the names of a run's own held-out rows."""
    named = config.data.eval_dataset or config.data.dataset
    entries: Sequence[Any] = [named] if isinstance(named, str) else named
    return [entry if isinstance(entry, str) else entry.path for entry in entries]
