"""Turn raw rows into tokens, chunk by chunk; runs in each tokenizing process.

Without torch a tokenizing process takes 0.06 GB instead of 0.25.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, InternalError, TrainerError, UnavailableError
from .bad_rows import BadRow, Row
from .columns import FormatName
from .examples import Chat, Encoded, Example
from .fingerprint import example_hash
from .formats import to_example
from .instructions import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["truncate", "drop", "error"]
TrainOn = Literal["assistant", "last", "all", "completion"]
TOO_LONG = "longer than max_seq_length"
NOTHING_LEFT = "no supervised token is left after truncation"
CODE_FILES = (
    "columns.py",
    "encoder.py",
    "fidelity.py",
    "formats.py",
    "instructions.py",
    "mask.py",
    "plain.py",
    "template.py",
    "turns.py",
)
"""A new version of these may tokenize differently, so their tokens are not reused."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)


class Encoder(Protocol):
    """Tokenizes examples."""

    def encode(self, example: Example) -> Encoded:
        """Tokenize an example; raises a RowError with the reason if that fails."""
        ...

    def flaws(self, example: Example, encoded: Encoded) -> tuple[str, ...]:
        """Return the fault of the loss mask of an example that is not truncated yet."""
        ...


class EncoderFactory(Protocol):
    """Creates the same encoder in any process, and hashes what it depends on."""

    @property
    def digest(self) -> str:
        """Return a hash that changes with the tokenizer, its template and the supervised turns."""
        ...

    def __call__(self) -> Encoder:
        """Create the encoder."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """How the rows of one dataset are converted and truncated."""

    format: FormatName
    columns: Mapping[str, str]
    max_seq_length: int
    too_long: TooLong


@dataclass(slots=True)
class EncodedChunk:
    """The concatenated tokens of N rows, and what happened to rows without tokens."""

    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    row_hashes: NDArray[np.uint64]
    rows: int
    truncated: int = 0
    longest: int = 0
    bad: list[BadRow] = field(default_factory=list)
    flawed: list[BadRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    too_long: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizerFactory:
    """Creates an encoder from the tokenizer in a folder.

    `chat_template` is the template's text if it is not the tokenizer's own.
    """

    tokenizer_dir: Path
    chat_template: str | None = None
    train_on: TrainOn = "assistant"
    trust_remote_code: bool = False

    @property
    def digest(self) -> str:
        """Hash the tokenizer's files, the template, the supervised turns and the code."""
        versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
        digest = hashlib.sha256("\0".join([*versions, self.train_on]).encode())
        digest.update(f"\0{self.chat_template!r}\0".encode())
        for name in CODE_FILES:
            digest.update(hashlib.sha256(Path(__file__).with_name(name).read_bytes()).digest())
        extra = sorted(self.tokenizer_dir.glob("additional_chat_templates/*.jinja"))
        for path in [*(self.tokenizer_dir / name for name in TOKENIZER_FILES), *extra]:
            if path.is_file():
                digest.update(f"\0{path.name}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def __call__(self) -> Encoder:
        """Load the tokenizer.

        Raises:
            UnavailableError: it is missing or does not load.
            ConfigError: the chat template is not valid Jinja.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.tokenizer_dir,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UnavailableError.of(
                "the tokenizer cannot be loaded",
                where=str(self.tokenizer_dir),
                why=f"{type(error).__name__} from transformers",
                remedy="download the model again, with its tokenizer.json and "
                "tokenizer_config.json",
            ) from error
        return TokenizerEncoder(tokenizer, self.chat_template, self.train_on)


class TokenizerEncoder:
    """Tokenizes with a transformers tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        train_on: TrainOn = "assistant",
    ) -> None:
        from . import mask, template

        self._mask = mask
        self._fault = template.TemplateFault
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._template: template.ChatTemplate | None = None
        self._no_template: ConfigError | None = None
        try:
            self._template = template.ChatTemplate.of(tokenizer, chat_template)
        except ConfigError as error:
            if chat_template is not None:
                raise
            # Plain text needs no template; a missing one is an error only for conversations.
            self._no_template = error

    def encode(self, example: Example) -> Encoded:
        """Tokenize an example."""
        if self._no_template is not None and isinstance(example, Chat):
            raise self._no_template
        try:
            return self._mask.encode(example, self._tokenizer, self._template, self._train_on)
        except self._fault as error:
            raise RowError(error.why) from None

    def flaws(self, example: Example, encoded: Encoded) -> tuple[str, ...]:
        """Audit the loss mask."""
        return tuple(flaw.value for flaw in self._mask.audit(example, encoded, self._tokenizer))


def encode_chunk(
    rows: Sequence[Row | BadRow], encoder: Encoder, settings: ChunkSettings, is_check: bool = False
) -> EncodedChunk:
    """Convert and tokenize rows; if `is_check`, only convert them, to find bad rows.

    Rows that were already bad when read pass through, so that findings stay in order.
    """
    pieces: list[Encoded] = []
    hashes: list[int] = []
    chunk = EncodedChunk(*_arrays(pieces, hashes), rows=len(rows))
    for row in rows:
        if isinstance(row, BadRow):
            chunk.bad.append(row)
            continue
        try:
            example = to_example(row.value, settings.format, settings.columns)
            if is_check:
                continue
            encoded = encoder.encode(example)
            flaws = encoder.flaws(example, encoded)
        except RowError as error:
            chunk.bad.append(BadRow(row.where, error.reason))
            continue
        except TrainerError:
            raise
        except Exception as error:  # its message and frames may quote the row
            raise InternalError.of(
                "a row cannot be tokenized", where=row.where, why=_cause(error)
            ) from None
        if flaws:
            chunk.flawed.append(BadRow(row.where, "; ".join(flaws)))
            continue
        fitting = _fit(encoded, row.where, settings, chunk)
        if fitting is not None:
            chunk.changes.update(change.value for change in encoded.changes)
            pieces.append(fitting)
            hashes.append(example_hash(example))
    chunk.ids, chunk.loss_mask, chunk.lengths, chunk.row_hashes = _arrays(pieces, hashes)
    return chunk


def _fit(
    encoded: Encoded, where: str, settings: ChunkSettings, chunk: EncodedChunk
) -> Encoded | None:
    """Truncate an example to the maximum length, or record in the chunk why it is dropped."""
    length, limit = len(encoded.input_ids), settings.max_seq_length
    chunk.longest = max(chunk.longest, length)
    if length <= limit:
        return encoded
    if settings.too_long == "error":
        chunk.too_long.append(BadRow(where, f"has {length:,} tokens, the limit is {limit:,}"))
        return None
    if settings.too_long == "drop":
        chunk.dropped[TOO_LONG] += 1
        return None
    if not any(encoded.loss_mask[1:limit]):
        # The first token is never predicted, so supervising only it trains nothing.
        chunk.dropped[NOTHING_LEFT] += 1
        return None
    chunk.truncated += 1
    return Encoded(encoded.input_ids[:limit], encoded.loss_mask[:limit])


def _cause(error: Exception) -> str:
    """Return an exception's type and the line of code that raised it, without its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    return type(error).__name__ + where


def _arrays(
    pieces: Sequence[Encoded], hashes: Sequence[int]
) -> tuple[NDArray[np.uint32], NDArray[np.bool_], NDArray[np.int64], NDArray[np.uint64]]:
    lengths = np.array([len(part.input_ids) for part in pieces], dtype=np.int64)
    total = int(lengths.sum())
    ids = np.fromiter((i for part in pieces for i in part.input_ids), np.uint32, total)
    loss_masks = np.fromiter((bit for part in pieces for bit in part.loss_mask), np.bool_, total)
    return ids, loss_masks, lengths, np.array(hashes, dtype=np.uint64)
