"""The prompt format used in training, and the tokens that end answers.

This is the single definition, derived from the training rows, for everything that prompts or
exports the model: the answers of an evaluation, `chat`, the exported generation config, the
tokenizer and the model card. It travels with the adapter as `prompt_format.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ..run_folder import RunFolder
from .batches import Rows

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Kind = Literal["chat", "completion", "text"]
FILE = "prompt_format.json"
CHAT_FORMATS = frozenset({"messages", "sharegpt", "alpaca", "alpaca_chat"})
MOST_ROWS = 4096
"""Number of rows inspected for end tokens, spread evenly over the data."""
LEAST_FRACTION = 0.01
"""A special token is an end token if at least this fraction of answers ends with it: a row
truncated at max_seq_length may stop at any token."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The format of the training rows: only `chat` uses the chat template.

    `end_token_ids` are the tokens that end an answer, most frequent first.
    """

    kind: Kind
    end_token_ids: tuple[int, ...]

    @property
    def has_template(self) -> bool:
        """Return whether prompts use the chat template."""
        return self.kind == "chat"

    def stops(self, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[int]:
        """Return the ids at which generation stops: the trained end tokens, then the base model's.

        `generation` is the base model's generation config.
        """
        return list(dict.fromkeys((*self.end_token_ids, *base_ends(tokenizer, generation))))

    def save(self, folder: Path) -> None:
        """Write it to an adapter's folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def format_of_rows(
    rows: Rows, formats: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> PromptFormat:
    """Derive the format from the training rows; `formats` are those of their datasets.

    If rows do not end with a special token, the tokenizer's own end token is used.
    """
    names = set(formats)
    kind: Kind = "text"
    if names & CHAT_FORMATS:
        kind = "chat"
    elif names & {"completion", "alpaca_text"}:
        kind = "completion"
    ends = _trained_ends(rows, tokenizer)
    if not ends and tokenizer.eos_token_id is not None:
        ends = (int(tokenizer.eos_token_id),)
    return PromptFormat(kind, ends)


def read_format(folder: Path | None, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return the format that an adapter's folder records, else what its tokenizer suggests."""
    recorded = None if folder is None else _recorded(folder / FILE)
    if recorded is None or (recorded.has_template and not tokenizer.chat_template):
        return _suggested(tokenizer)
    return recorded


def format_of_run(run: Path, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return the format that a run's `data.json` records, else what the tokenizer suggests."""
    return _recorded(RunFolder(run).data, "answers") or _suggested(tokenizer)


def _recorded(path: Path, *keys: str) -> PromptFormat | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            raw = raw[key]
        ends = tuple(int(one) for one in raw["end_token_ids"])
        if raw["kind"] in ("chat", "completion", "text"):
            return PromptFormat(cast(Kind, raw["kind"]), ends)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _suggested(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not tokenizer.chat_template:
        return PromptFormat("text", own)
    return PromptFormat("chat", _end_of_template(tokenizer) or own)


def base_ends(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[int]:
    """Return the end tokens that the base model's generation config and tokenizer name."""
    stated = getattr(generation, "eos_token_id", None)
    named = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(one) for one in named if one is not None))


def _trained_ends(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    from .mask import end_tokens

    special = end_tokens(tokenizer)
    counts: Counter[int] = Counter()
    answers = 0
    for index in np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(int):
        ids, loss_mask = rows[int(index)]
        supervised = np.asarray(loss_mask, dtype=bool)
        last = np.flatnonzero(supervised & ~np.append(supervised[1:], False))
        for position in last:
            answers += 1
            end = _last_visible(ids, supervised, int(position), tokenizer, special)
            if end in special:
                counts[end] += 1
    return tuple(t for t, count in counts.most_common() if count >= LEAST_FRACTION * answers)


def _last_visible(
    ids: Sequence[int] | Any,
    supervised: Any,
    position: int,
    tokenizer: PreTrainedTokenizerBase,
    special: frozenset[int],
) -> int:
    """Return the last supervised token up to `position` that is not white space."""
    while (
        position > 0
        and supervised[position - 1]
        and int(ids[position]) not in special
        and tokenizer.decode([int(ids[position])]).isspace()
    ):
        position -= 1
    return int(ids[position])


def _end_of_template(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special token that the chat template writes after an answer, if any."""
    from .mask import end_tokens

    answer = "forty-two"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # the template is the author's code and may fail in any way
        return ()
    _, match, behind = text.rpartition(answer)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if match else []
    special = end_tokens(tokenizer)
    return tuple(int(one) for one in ids if one in special)[:1]
