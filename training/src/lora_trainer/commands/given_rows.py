"""Rows that a command is given beside a model: `--dataset`, `--split`, `--dataset_columns`.

They are tokenized and masked as the run's own rows were. Without `--dataset` they are the
run's held-out rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import typer

from ..config.schema import Config
from ..errors import ConfigError
from .finetuned import FinetunedModel, locate_base, tokenizer_source

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GivenRows:
    """The rows that are asked for; `columns` is the flag's text."""

    dataset: tuple[str, ...] = ()
    split: str | None = None
    columns: str | None = None


def open_rows(finetuned: FinetunedModel, given: GivenRows) -> tuple[Config, Any]:
    """Tokenize or reopen the rows; return the configuration that they were read by, and the rows.

    Raises:
        DataError, ConfigError: there are no such rows, or they cannot be read.
        UnavailableError, AccessError: the base model's tokenizer cannot be had.
    """
    from ..data.batches import RowView
    from ..model import load
    from ..train.datasets import open_data

    data = finetuned.config.data
    has_own = finetuned.run is not None and (data.eval_dataset or data.eval_fraction > 0)
    if not given.dataset and not has_own:
        raise _no_rows(finetuned)
    config = _with_rows(finetuned.config, given)
    source = tokenizer_source(finetuned, locate_base(finetuned))
    tokenizer = load.load_tokenizer(source, config.model)
    typer.echo("reading the rows ...", err=True)
    splits = open_data(config, source, tokenizer)
    if not given.dataset and splits.eval is not None:
        return config, RowView(splits.eval, splits.eval_rows)
    return config, RowView(splits.train, splits.train_rows)


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many items, spread evenly; 0: all."""
    if not most or len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


def _with_rows(config: Config, given: GivenRows) -> Config:
    """Return the run's configuration with the rows that are asked for in its data section."""
    changes: dict[str, Any] = {"chat_template": None}  # it is the exported tokenizer's own
    if given.dataset:
        changes |= {"dataset": list(given.dataset), "eval_dataset": None, "eval_fraction": 0.0}
    if given.split:
        changes |= {"dataset_split": given.split}
    config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    if given.columns is not None:
        changes = {"dataset_columns": _columns_of(given.columns)}
    elif given.dataset and config.data.dataset_columns:
        changes = _inherited(config)
    else:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _columns_of(text: str) -> dict[str, str]:
    from ..config.literal import accepts, from_text

    columns = from_text("dataset_columns", text)
    if not isinstance(columns, dict) or not accepts("dataset_columns", columns):
        raise ConfigError.of(
            "--dataset_columns is no mapping",
            where="command line",
            why="it maps standard fields to columns, as JSON",
            remedy="""--dataset_columns '{"instruction": "<column>", "output": "<column>"}'""",
        )
    return columns


def _inherited(config: Config) -> dict[str, Any]:
    """Return what of the run's mapping fits the rows that are given; the rest is left out.

    Rows of other columns may also be of another format than the run's.
    """
    from ..data.bad_rows import Row
    from ..data.columns import applicable
    from ..data.formats import ROWS_TO_DETECT
    from ..data.read import iter_rows
    from ..train.datasets import source_specs

    columns = config.data.dataset_columns
    for spec in source_specs(config, config.data.dataset):
        first = islice(iter_rows(spec), ROWS_TO_DETECT)
        columns = applicable([row.value for row in first if isinstance(row, Row)], columns)
    left_out = config.data.dataset_columns.keys() - columns.keys()
    if not left_out:
        return {}
    typer.echo(
        f"the run's dataset_columns for {', '.join(sorted(left_out))} are left out: "
        "these rows have no such columns",
        err=True,
    )
    return {"dataset_columns": columns, "dataset_format": "auto"}


def _no_rows(finetuned: FinetunedModel) -> ConfigError:
    error: Any = ConfigError.of(
        "there are no rows to use",
        where="--dataset",
        why="no dataset was given, and the run has no held-out rows"
        if finetuned.run
        else "no dataset was given, and an adapter alone has none",
        remedy="--dataset FILE_FOLDER_OR_HUB_ID",
    )
    return error
