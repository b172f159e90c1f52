"""The datasets of a run: open, count and report them, and choose the rows of an epoch."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import named_templates
from ..config.schema import Config, DatasetSource
from ..data.batches import RowView
from ..data.cache import TokenizedDataset
from ..data.changes import warnings_of
from ..data.encoder import TokenizerFactory
from ..data.positions import find_rows
from ..data.prepare import DataSplits, PrepareSettings, prepare_splits
from ..data.prompt_format import PromptFormat, base_ends, format_of_rows
from ..data.resolve import SourceSpec, hub_id, locate
from ..data.split import epoch_rows
from ..errors import ConfigError, DataError, TrainerError
from ..host.disk import follow_umask
from ..memory_estimate import DataProfile
from ..model import load, sizes
from ..run.events import Event, progress_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def open_data(
    config: Config,
    source: load.ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    emit: Callable[[Event], None] = lambda _: None,
) -> DataSplits:
    """Tokenize or reopen the training and held-out data.

    Raises:
        DataError, AccessError, UnavailableError, StorageError: as `data.prepare` does.
    """
    data = config.data
    _refuse_unfit(data.chat_template, tokenizer)
    if config.model.hf_token:
        # The datasets library and the tokenizing processes look for it here.
        os.environ.setdefault("HF_TOKEN", config.model.hf_token)
    cache = load.dataset_cache_of(data)
    factory = TokenizerFactory(
        _tokenizer_folder(source, tokenizer, cache),
        None if data.chat_template is None else load.template_text(data.chat_template),
        data.train_on,
        config.model.trust_remote_code,
    )
    return prepare_splits(
        source_specs(config, data.dataset),
        source_specs(config, data.eval_dataset),
        data.eval_fraction,
        config.training.seed,
        encoder=factory,
        settings=PrepareSettings(
            data.max_seq_length, data.too_long, data.on_bad_rows, data.max_bad_rows_share
        ),
        vocab_size=len(tokenizer),
        cache_dir=cache,
        num_workers=data.preprocessing_num_workers,
        progress=progress_of(emit, "rows"),
    )


def _refuse_unfit(name: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that ships by name and whose markers are plain text to the tokenizer."""
    if name not in named_templates.NAMES:
        return
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    fitting = named_templates.fitting(added)
    if name not in fitting:
        missing = [marker for marker in named_templates.MARKERS[name] if marker not in added]
        raise ConfigError.of(
            f"the chat template {name} does not fit this tokenizer",
            where="chat_template",
            why=f"{', '.join(missing)} would be plain text: no token would end an answer",
            remedy=f"set chat_template to {' or '.join(fitting)}, or remove it"
            if fitting
            else "remove it, or set it to a Jinja file with markers that the tokenizer has",
        )


def data_warnings(config: Config, splits: DataSplits) -> list[str]:
    """Return, in words, what became of rows that are not trained as they stand in the data."""
    warnings = list(splits.warnings)
    for name, report in (("dataset", splits.train_report), ("eval_dataset", splits.eval_report)):
        if report is None:
            continue
        if ended := report.processes_restarted:
            processes = "1 tokenizing process" if ended == 1 else f"{ended} tokenizing processes"
            warnings.append(f"{name}: {processes} died; the rows were processed again")
        if report.rows_truncated:
            warnings.append(
                f"{name}: {report.rows_truncated:,} of {report.rows_read:,} rows are truncated to "
                f"max_seq_length {config.data.max_seq_length} (--max_seq_length "
                f"{report.longest_tokens} keeps the longest whole)"
            )
        for verb, counts in (("left out", report.rows_dropped), ("skipped", report.rows_skipped)):
            warnings += [f"{name}: {count:,} rows {verb}: {why}" for why, count in counts.items()]
        warnings += [
            f"{name}: {text}" for text in warnings_of(report.rows_changed, report.rows_used)
        ]
    if config.training.eval_generate:
        warnings += _answers_out_of_reach(splits, config.training.eval_max_new_tokens)
    return warnings


def _answers_out_of_reach(splits: DataSplits, limit: int) -> list[str]:
    """Warn of expected answers that no answer of so many tokens can match."""
    rows = RowView(splits.train if splits.eval is None else splits.eval, splits.eval_rows)
    lengths = [_last_answer_tokens(rows[index][1]) for index in range(len(rows))]
    long = [length for length in lengths if length > limit]
    if not long:
        return []
    return [
        f"{len(long):,} of {len(rows):,} held-out answers are longer than eval_max_new_tokens "
        f"{limit} and cannot be an exact match (--eval_max_new_tokens {max(long)} fits the longest)"
    ]


def _last_answer_tokens(mask: NDArray[Any]) -> int:
    """Return the length of a row's last run of trained tokens, without the token that ends it."""
    supervised = np.flatnonzero(np.asarray(mask, dtype=bool))
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    return len(supervised) - (int(breaks[-1]) + 1 if len(breaks) else 0) - 1


def format_of_splits(splits: DataSplits, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return how the training rows ask, and what ends their answers."""
    rows = RowView(splits.train, splits.train_rows)
    return format_of_rows(rows, splits.train_report.formats, tokenizer)


def end_warning(
    prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> list[str]:
    """Say so where the trained answers end with another token than the base model's own.

    `generation` is the base model's generation config.
    """
    own = base_ends(tokenizer, generation)
    if not prompt_format.end_token_ids or prompt_format.end_token_ids[0] in own:
        return []
    token = tokenizer.convert_ids_to_tokens(prompt_format.end_token_ids[0])
    base = ", ".join(tokenizer.convert_ids_to_tokens(own)) or "none"
    return [
        f"the trained answers end with {token}, which is not an end token of the base model "
        f"({base}): the exported generation config, tokenizer and model card name it"
    ]


def source_specs(
    config: Config, named: str | Sequence[str | DatasetSource] | None
) -> list[SourceSpec]:
    """Return the datasets that a config names, each with the defaults of the data section."""
    data = config.data
    entries = [] if named is None else [named] if isinstance(named, str) else list(named)
    specs = []
    for entry in entries:
        # Not validated: `evaluate` takes any name that the file system has, UTF-8 or not.
        one = DatasetSource.model_construct(path=entry) if isinstance(entry, str) else entry
        specs.append(
            SourceSpec(
                path_or_id=one.path,
                weight=one.weight,
                format=one.format or data.dataset_format,
                split=one.split or data.dataset_split,
                columns=data.dataset_columns if one.columns is None else one.columns,
                revision=one.revision,
                subset=one.subset,
                max_samples=one.max_samples or data.max_samples,
                datasets_dir=data.datasets_dir,
            )
        )
    return specs


def hub_ids(config: Config) -> tuple[str, ...]:
    """Return the hub's names of the training data; a local file has none, also when gone by now."""
    ids: dict[str, None] = {}
    for spec in source_specs(config, config.data.dataset):
        with contextlib.suppress(TrainerError):
            if locate(spec) is None:
                ids[hub_id(spec)] = None
    return tuple(ids)


def name_rows(config: Config, data: TokenizedDataset, indices: Sequence[int]) -> list[str]:
    """Name tokenized rows by file and line; by number where their source cannot be read."""
    hashes = [int(data.row_hashes[index]) for index in indices]
    names: dict[int, list[str]] = {}
    for named in (config.data.dataset, config.data.eval_dataset):
        with contextlib.suppress(TrainerError, OSError):
            for key, lines in find_rows(source_specs(config, named), set(hashes)).items():
                names.setdefault(key, []).extend(lines)
    return [
        ", ".join(names.get(key, [f"row {index + 1} of the tokenized data"]))
        for key, index in zip(hashes, indices, strict=True)
    ]


def _tokenizer_folder(
    source: load.ModelSource, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> Path:
    """Return a folder from which other processes load the same tokenizer without a network."""
    if source.is_local:
        return Path(source.path)
    key = hashlib.sha256(f"{source.path}@{source.revision}".encode()).hexdigest()[:16]
    folder = cache / "tokenizers" / key
    tokenizer.save_pretrained(str(folder))
    follow_umask(folder)
    return folder


def data_digest(splits: DataSplits, weights: list[float]) -> str:
    """Return a hash of the rows that are trained, with their weights, and of the held-out ones."""
    digests = [splits.train.digest, repr(weights)]
    digests += [_hash(rows) for rows in (splits.train.sources, splits.train_rows, splits.eval_rows)]
    digests += [splits.eval.digest] if splits.eval is not None else []
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def _hash(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def rows_of_epoch_in(splits: DataSplits, weights: list[float], seed: int) -> Callable[[int], Any]:
    """Return the function that chooses an epoch's rows by the sources' weights."""
    data = splits.train
    return lambda epoch: epoch_rows(
        data.row_hashes, data.sources, weights, splits.train_rows, epoch, seed
    )


def rows_to_train(rows_of_epoch: Callable[[int], Any]) -> int:
    """Return how many rows an epoch has.

    Raises:
        DataError: none.
    """
    rows = len(rows_of_epoch(0))
    if not rows:
        raise DataError.of(
            "no row is left to train on",
            where="data.dataset",
            why="the weights of the datasets are too small to select any rows",
            remedy="raise a weight: 1.0 uses every row once per epoch",
        )
    return rows


# More than a micro-batch has, for the plan of the largest one.
LONGEST_ROWS = 256


def profile_of(splits: DataSplits, rows: int) -> DataProfile:
    """Return what the plan needs to know of the data."""
    lengths = splits.train.lengths[splits.train_rows]
    supervised = splits.train.supervised_counts[splits.train_rows]
    return DataProfile(
        rows=rows,
        tokens=int(lengths.sum()),
        supervised_tokens=int(supervised.sum()),
        longest=int(lengths.max()),
        eval_rows=len(splits.eval_rows),
        longest_rows=tuple(int(one) for one in np.sort(lengths)[::-1][:LONGEST_ROWS]),
        most_supervised=int(supervised.max()),
    )


def refuse_long_rows(config: Config, model: Any, splits: DataSplits) -> None:
    """Refuse rows beyond the positions that the model knows.

    Raises:
        ConfigError: a row is longer.
    """
    limit = sizes.positions(model.config)
    longest = max(int(d.lengths.max()) for d in (splits.train, splits.eval) if d is not None)
    if limit and longest > limit:
        raise ConfigError.of(
            f"max_seq_length {config.data.max_seq_length} is longer than the model's context",
            where="data.max_seq_length",
            why=f"the longest row has {longest} tokens, the model {limit} positions",
            remedy=f"--max_seq_length {limit}",
        )
