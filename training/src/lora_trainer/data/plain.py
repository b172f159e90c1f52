"""Tokenize plain text with the tokenizer's own tokens and an end token, each once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .examples import Change, Encoded
from .template import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"<\|[\w-]{2,40}\|>|<(?:start|end)_of_turn>")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool
) -> tuple[list[int], list[Span]]:
    """Return the token ids of a text and the character span of each.

    Raises:
        ConfigError: the tokenizer does not report character spans.
    """
    if not tokenizer.is_fast:
        raise ConfigError.of(
            "the model has only a slow tokenizer",
            where="model_name_or_path",
            why="it does not report which characters a token covers",
            remedy="use a model with a tokenizer.json",
        )
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoding["input_ids"]), encoding["offset_mapping"]


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> Encoded:
    """Encode text supervised from character `start` on, with its end token.

    A start or end token that the text already contains is not added again.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError.of(
            "the tokenizer has no end token",
            where="model_name_or_path",
            why="a model trained without an end token never stops",
        )
    ids, offsets = tokenize(tokenizer, text, add_special_tokens=True)
    changes: list[Change] = []
    bos = tokenizer.bos_token_id
    if len(ids) > 1 and ids[0] == ids[1] == bos and _is_added(offsets[0]):
        del ids[0], offsets[0]
        changes.append(Change.START_SPELLED)
    if len(ids) > 1 and ids[-1] == end and _is_added(offsets[-1]):
        del ids[-1], offsets[-1]
    loss_mask = [start == 0 or last > start for _, last in offsets]
    spelled = _last_word(offsets, text)
    if spelled is not None and ids[spelled] == end:
        changes.append(Change.END_SPELLED)
        loss_mask[spelled] = True
    else:
        ids.append(end)
        loss_mask.append(True)
    if any(not _is_token(tokenizer, marker[0]) for marker in _MARKER.finditer(text)):
        changes.append(Change.MARKER_UNKNOWN)
    return Encoded(ids, loss_mask, tuple(changes))


def _is_added(offset: Span) -> bool:
    """Return whether a token was added by the tokenizer and stands for no characters."""
    return offset[0] == offset[1]


def _last_word(offsets: Sequence[Span], text: str) -> int | None:
    """Return the position of the last non-white-space token."""
    for position in range(len(offsets) - 1, -1, -1):
        first, last = offsets[position]
        if text[first:last].strip():
            return position
    return None


def _is_token(tokenizer: PreTrainedTokenizerBase, marker: str) -> bool:
    number = tokenizer.convert_tokens_to_ids(marker)
    return number is not None and number != tokenizer.unk_token_id
