"""What an adapter is worth on any data: `lora-trainer evaluate RUN --dataset FILE`.

The same rows through the base model and through the adapter: loss, perplexity, token
accuracy, and the share of answers that are exactly the expected ones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from ..config.schema import Config
from ..errors import ConfigError
from ..report.progress import Meter
from ..units import duration, number, percent
from .finetuned import FinetunedModel, LoadedModel, locate_base, open_model, tokenizer_source

NAMES = ("exact_match", "loss", "perplexity", "token_accuracy")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to evaluate on, and how far."""

    dataset: tuple[str, ...] = ()
    split: str | None = None
    rows: int = 0
    has_answers: bool = True
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
    lines = [f"{'held-out rows':<16}" + "".join(f"{title:>12}" for title, _ in shown)]
    for name in NAMES:
        cells = [_cell(name, getattr(figures, name)) for _, figures in shown]
        if any(cells):
            lines.append(f"{name.replace('_', ' '):<16}" + "".join(f"{cell:>12}" for cell in cells))
    asked = f", {result.questions:,} answered" if result.questions else ""
    lines += ["", f"{result.rows:,} rows{asked}, {duration(result.seconds)}"]
    return lines


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "infinite" if name == "perplexity" else ""
    return percent(value) if name in ("exact_match", "token_accuracy") else number(value)


def _compare(finetuned: FinetunedModel, wanted: Wanted) -> Comparison:
    from ..data.batches import RowView
    from ..model import load, probe
    from ..train.datasets import open_data

    start = time.monotonic()
    data = finetuned.config.data
    has_own = finetuned.run is not None and (data.eval_dataset or data.eval_fraction > 0)
    if not wanted.dataset and not has_own:
        raise _no_rows(finetuned)
    config = _data_config(finetuned.config, wanted)
    source = tokenizer_source(finetuned, locate_base(finetuned))
    tokenizer = load.load_tokenizer(source, config.model)
    typer.echo("reading the rows ...", err=True)
    splits = open_data(config, source, tokenizer)
    chosen, held = splits.train_rows, splits.train
    if not wanted.dataset and splits.eval is not None:
        chosen, held = splits.eval_rows, splits.eval
    view = RowView(held, chosen[: wanted.rows] if wanted.rows else chosen)
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
        dataset=list(wanted.dataset) or _named(finetuned.config),
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
        score = evaluate.score(opened.causal, rows, batch_examples=batch, progress=meter.update)
    assert score is not None, "nothing asked it to stop"
    exact, asked = None, evaluate.questions(rows) if wanted.has_answers else []
    if asked:
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


def _data_config(config: Config, wanted: Wanted) -> Config:
    """Return the run's configuration with the rows that are asked for in its data section."""
    changes: dict[str, Any] = {"chat_template": None}  # it is the exported tokenizer's own
    if wanted.dataset:
        changes |= {"dataset": list(wanted.dataset), "eval_dataset": None, "eval_fraction": 0.0}
    if wanted.split:
        changes |= {"dataset_split": wanted.split}
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _named(config: Config) -> list[str]:
    """Return the names of a run's own held-out rows."""
    named = config.data.eval_dataset or config.data.dataset
    entries: Sequence[Any] = [named] if isinstance(named, str) else named
    return [entry if isinstance(entry, str) else entry.path for entry in entries]


def _no_rows(finetuned: FinetunedModel) -> ConfigError:
    error: Any = ConfigError.of(
        "there are no rows to evaluate on",
        where="--dataset",
        why="none is given, and the run had no held-out rows of its own"
        if finetuned.run
        else "none is given, and an adapter alone names no data",
        remedy="--dataset FILE_FOLDER_OR_HUB_ID",
    )
    return error
