"""Evaluation metrics: loss, perplexity, token accuracy; and exact match of generated answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.batches import Rows, fill_in_order
from ..data.mask import end_tokens
from ..data.turns import ROLES
from ..model import determinism
from ..model.forward import CausalLM, MicroBatch
from ..model.ranks import ALONE, Ranks
from ..run.memory_limits import in_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# exp() of more is a number that says nothing; shown as infinite.
LARGEST_EXPONENT = 50.0
LISTEN_SECONDS = 0.5  # between two looks at answers that are being made


@dataclass(frozen=True, slots=True)
class Score:
    """Mean figures over the targets of a dataset; `suspects` are rows of batches not finite."""

    loss: float
    token_accuracy: float
    targets: int
    seconds: float
    suspects: tuple[int, ...] = ()
    batch_examples: int = 0  # how many rows fitted into memory at a time

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else math.inf


def take(rows: Rows, indices: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
    """Read rows as a micro-batch."""
    pairs = [rows[int(index)] for index in indices]
    return MicroBatch(
        [np.asarray(ids, dtype=np.int64) for ids, _ in pairs],
        [np.asarray(mask, dtype=bool) for _, mask in pairs],
    )


def score(
    causal: CausalLM,
    rows: Rows,
    *,
    batch_examples: int,
    is_by_tokens: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> Score | None:
    """Score all rows; None when stopped before the end. Uses no random numbers.

    By tokens, a batch has as many as the `batch_examples` longest rows. `progress` receives the
    number of rows done, batch by batch. Several ranks take turns at the batches, and add their
    figures up in the batches' order: the score is the same whatever their number.
    """
    start = time.monotonic()
    was_training = causal.model.training
    causal.model.eval()
    batches = list(_by_length(rows, batch_examples))
    if is_by_tokens:
        batches = _by_tokens(rows, batches, is_padded=causal.packed is None)
    figures = torch.zeros(len(batches), 3, dtype=torch.float64)
    last, halvings, done = len(batches) - 1, 0, 0
    try:
        for first in range(0, len(batches), ranks.count):
            if should_stop():
                return None
            # Ranks that share a model must all go through it: at the end, once too often.
            own = first + ranks.rank
            if own < len(batches) or causal.is_sharded:
                batch = batches[min(own, last)]
                pieces, halvings = _score_pieces(causal, rows, batch, halvings)
            if own < len(batches):
                figures[own] = pieces
            done += sum(len(batch) for batch in batches[first : first + ranks.count])
            progress(done)
    finally:
        causal.model.train(was_training)
    rows_of_figures = ranks.summed(figures).tolist()
    loss = sum(row[0] for row in rows_of_figures)
    hits, targets = (int(sum(row[at] for row in rows_of_figures)) for at in (1, 2))
    seconds = time.monotonic() - start
    pairs = zip(batches, rows_of_figures, strict=True)
    suspects = [index for batch, row in pairs if not math.isfinite(row[0]) for index in batch]
    loss, accuracy = loss / max(1, targets), hits / max(1, targets)
    fitting = max(1, batch_examples >> halvings)
    return Score(loss, accuracy, targets, seconds, tuple(suspects), fitting)


def _score_pieces(
    causal: CausalLM, rows: Rows, batch: Sequence[int], halvings: int
) -> tuple[torch.Tensor, int]:
    """Return loss, hits and targets of a batch, and how often a batch is halved to fit."""

    def scored(piece: Sequence[int]) -> list[float]:
        micro = take(rows, piece)
        return [*causal.score(micro), micro.targets]

    size = max(1, len(batch) >> halvings)
    pieces, most = in_pieces(batch, size, scored, is_divisible=not causal.is_sharded)
    while max(1, len(batch) >> halvings) > most:
        halvings += 1
    return torch.tensor(pieces, dtype=torch.float64).sum(0), halvings


def _by_tokens(rows: Rows, batches: Sequence[Sequence[int]], *, is_padded: bool) -> list[list[int]]:
    """Group rows, longest first, in batches of no more tokens than the first of these has."""
    if not batches:
        return []
    lengths = {index: len(rows[index][0]) for batch in batches for index in batch}
    first = [lengths[index] for index in batches[0]]
    budget = len(first) * max(first) if is_padded else sum(first)
    return fill_in_order(lengths, lengths, budget, is_padded=is_padded)


def _by_length(rows: Rows, batch_examples: int) -> Iterator[list[int]]:
    """Group rows of similar length, longest first: least padding, and no memory surprise late."""
    ranking = sorted(range(len(rows)), key=lambda index: (-len(rows[index][0]), index))
    for start in range(0, len(ranking), batch_examples):
        yield ranking[start : start + batch_examples]


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt and its expected answer, as token ids; cut from one example."""

    index: int
    prompt: list[int]
    expected: list[int]


def questions(rows: Rows) -> list[Question]:
    """Cut each example before its last run of trained tokens; one without a prompt is left out."""
    asked = []
    for index in range(len(rows)):
        ids, mask = rows[index]
        loss_mask = np.asarray(mask, dtype=bool)
        if not loss_mask.any():
            continue
        end = len(loss_mask) - int(loss_mask[::-1].argmax())
        before = np.flatnonzero(~loss_mask[:end])
        start = int(before[-1]) + 1 if len(before) else 0
        if start > 0:
            asked.append(
                Question(index, [int(i) for i in ids[:start]], [int(i) for i in ids[start:end]])
            )
    return asked


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer beside the expected one, as text without special tokens.

    `prompt` is the turn that is answered; of a row without turns, all before the answer.
    """

    index: int
    prompt: str
    expected: str
    answer: str

    @property
    def is_exact(self) -> bool:
        """Return whether both are the same, surrounding white space aside."""
        return self.expected.strip() == self.answer.strip()


@torch.no_grad()
def answer(
    causal: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    *,
    ends: Sequence[int],
    batch_examples: int,
    max_new_tokens: int,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda _: None,
    advance: Callable[[float], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> list[Answer] | None:
    """Answer every question greedily, in batches padded on the left; None when stopped.

    `progress` is given how many are answered, `advance` the share of the longest that the
    work may be; both also within a batch. Several ranks take turns at the batches; where they
    share a model, all answer all.

    An answer ends with the tokenizer's end token or with the token that ends the
    expected answers (a template's end of turn), or after `max_new_tokens`.
    """
    ranked = sorted(asked, key=lambda q: (len(q.expected), len(q.prompt), q.index))
    # Token ids plus one, so that zero means none, and ranks can add theirs up.
    ids_plus_one = torch.zeros(len(ranked), max_new_tokens, dtype=torch.int64)
    sharing = ALONE if causal.is_sharded else ranks
    with causal.generating(), determinism.relaxed():
        for first in range(0, len(ranked), batch_examples * sharing.count):
            if should_stop():
                return None
            start = first + batch_examples * sharing.rank
            batch = ranked[start : start + batch_examples]

            def hear(
                finished: int, tokens: int, first: int = first, size: int = len(batch)
            ) -> None:
                advance((first + size * tokens / max_new_tokens) / len(ranked))
                progress(min(len(ranked), first + finished))

            if batch:
                answers = _generate(causal, tokenizer, batch, list(ends), max_new_tokens, hear)
                for row, ids in enumerate(answers, start):
                    ids_plus_one[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
            progress(min(len(ranked), first + batch_examples * sharing.count))
    decoded = [
        _decode(tokenizer, question, [int(i) - 1 for i in row if i])
        for question, row in zip(ranked, sharing.summed(ids_plus_one).tolist(), strict=True)
    ]
    return sorted(decoded, key=lambda one: one.index)


def _generate(
    causal: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Question],
    ends: list[int],
    max_new_tokens: int,
    hear: Callable[[int, int], None],
) -> list[list[int]]:
    longest = max(len(question.prompt) for question in batch)
    ids = torch.full((len(batch), longest), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(batch):
        ids[row, longest - len(question.prompt) :] = torch.tensor(question.prompt)
        mask[row, longest - len(question.prompt) :] = 1
    output = causal.model.generate(
        input_ids=ids.to(causal.device),
        attention_mask=mask.to(causal.device),
        # Ranks that gather layers together go on until each has its answers.
        synced_gpus=causal.is_sharded,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[_Listener(longest, ends, hear)],
    )
    rows = output[:, longest:].tolist()
    return [_until_end(row, set(ends)) for row in rows]


class _Listener:
    """A stopping criterion that stops nothing: it hears of a batch's tokens as they are made.

    `hear` is given the answers that have ended, and the tokens of those that go on.
    """

    def __init__(self, prompt: int, ends: list[int], hear: Callable[[int, int], None]) -> None:
        self._prompt = prompt
        self._ends = torch.tensor(ends, dtype=torch.int64)
        self._hear = hear
        self._heard = time.monotonic()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return for each answer that it may go on."""
        del scores
        if time.monotonic() - self._heard >= LISTEN_SECONDS:
            self._heard = time.monotonic()
            answers = input_ids[:, self._prompt :].cpu()
            has_ended = torch.isin(answers, self._ends).any(dim=1)
            self._hear(int(has_ended.sum()), answers.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[:position]
    return ids


def _decode(
    tokenizer: PreTrainedTokenizerBase, question: Question, answer_ids: list[int]
) -> Answer:
    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    asked = _last_turn(question.prompt, end_tokens(tokenizer), text)
    return Answer(question.index, asked, text(question.expected), text(answer_ids))


def _last_turn(prompt: list[int], special: frozenset[int], text: Callable[[list[int]], str]) -> str:
    """Return the last turn before the generation prompt: special tokens and role names go."""
    pieces: list[list[int]] = [[]]
    for token in prompt:
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(token)
    if len(pieces) == 1:
        return text(prompt)
    turns = [turn for piece in pieces if (turn := text(piece).strip())]
    while len(turns) > 1 and turns[-1].lower() in ROLES:
        turns.pop()
    role, newline, rest = (turns or [""])[-1].partition("\n")
    is_headed = bool(newline) and role.strip().lower() in ROLES
    return rest.strip() if is_headed else (turns or [""])[-1]
