"""The loss mask: which tokens of an example are supervised.

Supervised tokens are those that the model must generate: from the end of the generation prompt up
to and including the token that ends the turn. The separator after it, usually a newline, belongs to
the next prompt and is not supervised. In a template with `{% generation %}` tags, the tags decide
instead.

The start of a turn is observed while the template runs (see `template`). The end of its generation
prompt is found by rendering the conversation up to the turn, as for inference: what both renderings
share after the turn's start is the prompt, the rest is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from . import fidelity
from .examples import Change, Chat, Completion, Encoded, Example
from .plain import encode_plain, tokenize
from .template import ChatTemplate, Rendering, Span, TemplateFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all", "completion"]

# Where to cut a prompt that matches a turn only partly: after a line, else after a tag.
_EDGES = (re.compile(r".*\n", re.DOTALL), re.compile(r".*[>\]:]", re.DOTALL))


class Flaw(Enum):
    """Why the loss mask of an example is invalid."""

    TRAINS_NOTHING = "no token is supervised"
    END_NOT_TRAINED = "the token that ends the assistant's turn is not supervised"
    NO_END = "no token ends the assistant's turn"


@dataclass(frozen=True, slots=True)
class Marked:
    """A conversation as text, and its supervised spans: sorted, not touching."""

    text: str
    spans: tuple[Span, ...]
    changes: tuple[Change, ...] = ()


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    train_on: TrainOn,
) -> Encoded:
    """Tokenize an example and compute its loss mask.

    Conversations are tokenized as the template writes them: it adds its own special
    tokens. Completions and texts get what the tokenizer adds, and an end token. A token across the
    edge of a supervised span is supervised: no character of an answer is lost.

    Raises:
        TemplateFault: the template rejects the conversation.
        ConfigError: the tokenizer or its template cannot do this for any example.
    """
    if train_on == "completion":
        has_prompt = isinstance(example, Completion) or (
            isinstance(example, Chat) and example.prompt_turns > 0
        )
        train_on = "assistant" if has_prompt else "all"
    if isinstance(example, Chat):
        if template is None:
            raise ConfigError.of("conversations need a chat template", where="chat_template")
        marked = mark(example, template, train_on)
        ids, offsets = tokenize(tokenizer, marked.text, add_special_tokens=False)
        return Encoded(ids, _cover(offsets, marked.spans), marked.changes)
    if isinstance(example, Completion):
        start = 0 if train_on == "all" else len(example.prompt)
        return encode_plain(tokenizer, example.prompt + example.completion, start)
    return encode_plain(tokenizer, example.text, 0)


def audit(
    example: Example, encoded: Encoded, tokenizer: PreTrainedTokenizerBase
) -> tuple[Flaw, ...]:
    """Return the fault of the loss mask of an example that is not truncated yet, or None."""
    if not any(encoded.loss_mask):
        return (Flaw.TRAINS_NOTHING,)
    if not isinstance(example, Chat):
        return ()
    ends = end_tokens(tokenizer)
    ids = encoded.input_ids
    runs = _run_ends(encoded.loss_mask)
    if all(ids[_skip_blank(ids, end, tokenizer, step=-1)] in ends for end in runs):
        return ()
    # Only the last turn, which no prompt follows, shows whether an end token is written.
    behind = _skip_blank(ids, runs[-1] + 1, tokenizer, step=1)
    is_written = behind < len(ids) and ids[behind] in ends
    return (Flaw.END_NOT_TRAINED if is_written else Flaw.NO_END,)


def mark(chat: Chat, template: ChatTemplate, train_on: TrainOn) -> Marked:
    """Render a conversation and find its supervised spans.

    Raises:
        TemplateFault: the template rejects the conversation, hides its turns or drops answers, tool
        calls or tools; or the conversation contains the template's control tokens.
    """
    template.refuse_control_tokens([*chat.messages, *chat.tools])
    messages, tools = template.normalize(chat.messages, chat.tools)
    whole = template.trace(messages, tools)
    turns = _trained_turns(chat, train_on)
    spans: Iterable[Span]
    if train_on == "all":
        spans = _all_but(chat.muted, whole)
    elif template.has_generation_spans:
        spans = _marks_of(whole, turns, chat)
    elif whole.is_traced:
        spans = _Turns(template, messages, tools, whole).spans(turns)
    else:
        spans = _spans_by_prefix(template, messages, tools, whole, turns)
    marked = Marked(whole.text, _join(spans))
    for turn in turns:
        own = whole.written_by(turn, marked.spans)
        for token in template.control_tokens:
            own = own.replace(token, "")
        fidelity.check_answer(chat.messages[turn], marked.text, marked.spans, own, template)
    fidelity.check_tools(chat, whole, template)
    return replace(marked, changes=fidelity.changes_of(chat, turns, whole, marked.spans, template))


def _trained_turns(chat: Chat, train_on: TrainOn) -> list[int]:
    """Return the indices of the supervised assistant turns.

    Raises:
        TemplateFault: the row excludes all of them.
    """
    start = 0 if train_on == "all" else chat.prompt_turns
    turns = [n for n, m in enumerate(chat.messages) if m.get("role") == "assistant" and n >= start]
    if train_on == "last":
        turns = turns[-1:]
    supervised = [turn for turn in turns if turn not in chat.muted]
    if turns and not supervised:
        raise TemplateFault("train_on is last, and the last turn is marked as not supervised")
    return supervised


def _all_but(muted: frozenset[int], whole: Rendering) -> list[Span]:
    """Return the whole text without the muted turns."""
    if not muted:
        return [(0, len(whole.text))]
    _refuse_hidden_turns(whole)
    return [(piece.start, piece.end) for piece in whole.pieces if piece.owner not in muted]


def _marks_of(whole: Rendering, turns: Sequence[int], chat: Chat) -> Iterable[Span]:
    """Return the template's own generation spans, of supervised turns only."""
    assistants = [n for n, m in enumerate(chat.messages) if m.get("role") == "assistant"]
    if turns == assistants:
        return whole.generation_spans
    if not whole.is_traced and turns == assistants[-1:]:
        return whole.generation_spans[-1:]
    _refuse_hidden_turns(whole)
    return [
        mark for turn in turns for mark in whole.generation_spans if _is_within(mark, turn, whole)
    ]


def _is_within(mark: Span, turn: int, whole: Rendering) -> bool:
    """Return whether a span starts in a turn, or between it and the next message."""
    first = min((piece.start for piece in whole.pieces_of(turn)), default=len(whole.text))
    others = (p.start for p in whole.pieces if p.owner not in (turn, None) and p.start > first)
    return first <= mark[0] < min(others, default=len(whole.text))


def _refuse_hidden_turns(whole: Rendering) -> None:
    if not whole.is_traced:
        raise TemplateFault(
            "it cannot be determined to which turn a part of the chat template's text belongs"
        )


class _Turns:
    """Finds the supervised spans of a conversation rendered message by message."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        whole: Rendering,
    ) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._whole = whole
        # One prompt rendering per kind of predecessor keeps long conversations linear.
        self._cues: dict[str, str] = {}

    def spans(self, turns: Sequence[int]) -> list[Span]:
        spans: list[Span] = []
        for turn in turns:
            pieces = [(piece.start, piece.end) for piece in self._whole.pieces_of(turn)]
            if not pieces:
                continue
            first, last = pieces[0][0], self._end(turn, pieces[-1][1])
            pieces[-1] = (pieces[-1][0], last)
            start = first + self._prompted(turn, first, last)
            end = _strip(self._whole.text, start, last)
            spans += [(max(a, start), min(b, end)) for a, b in pieces]
        return spans

    def _prompted(self, turn: int, first: int, last: int) -> int:
        """Return how many characters at the start of a turn the generation prompt writes."""
        text = self._whole.text[first:last]
        if not turn:
            # A template may insert a default system turn before the first assistant turn.
            cue = self._cue_after_user()
            inside = text.find(cue)
            return inside + len(cue) if inside >= 0 else _follow(cue, text)
        prompted = _follow(self._cue(turn, first), text)
        if not prompted and text.startswith(cue := self._cue_after_user()):
            # Some templates write no prompt after a tool result, but the turn has a header there.
            return len(cue)
        return prompted

    def _end(self, turn: int, end: int) -> int:
        """Count an end-of-text token after the last message as the end of its turn."""
        text = self._whole.text
        eos = self._template.tokenizer.eos_token
        is_last = turn == len(self._messages) - 1
        return len(text) if is_last and eos and text[end:].strip() == eos else end

    def _cue(self, turn: int, first: int) -> str:
        """Return the part of a turn's generation prompt that the turn may repeat."""
        before = str(self._messages[turn - 1].get("role"))
        if before not in self._cues:
            try:
                self._cues[before] = self._render_cue(turn, first)
            except TemplateFault:
                # For example, a conversation without a user turn is rejected on its own.
                self._cues[before] = self._cue_after_user()
        return self._cues[before]

    def _render_cue(self, turn: int, first: int) -> str:
        prompt = self._template.trace(self._messages[:turn], self._tools, True)
        here, there = 0, 0
        for number in range(turn - 1, -1, -1):
            if (mine := self._whole.pieces_of(number)) and (its := prompt.pieces_of(number)):
                here, there = mine[0].start, its[0].start
                break
        leading = self._whole.text[here:first]
        if prompt.text.startswith(leading, there):
            return prompt.text[there + len(leading) :]
        # The last message before a prompt may be rendered differently (with tools in front of it,
        # for example), but its end is the same as in the full text.
        tail = leading[-32:]
        position = prompt.text.rfind(tail, there) if tail else -1
        return prompt.text[position + len(tail) :] if position >= 0 else ""

    def _cue_after_user(self) -> str:
        """Return the generation prompt after a conversation's first question."""
        if "" not in self._cues:
            users = [message for message in self._messages if message.get("role") == "user"]
            probe, _ = self._template.normalize(users[:1] or [{"role": "user", "content": "Hello"}])
            plain = self._template.trace(probe, self._tools).text
            prompt = self._template.trace(probe, self._tools, True).text
            self._cues[""] = prompt[_common_length(plain, prompt) :]
        return self._cues[""]


def _spans_by_prefix(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    whole: Rendering,
    turns: Sequence[int],
) -> list[Span]:
    """Find turns only from renderings of shorter conversations, if these are prefixes."""
    spans: list[Span] = []
    for turn in turns:
        prompt = template.trace(messages[:turn], tools, True).text
        if not whole.text.startswith(prompt):
            raise TemplateFault(
                "the start of the assistant's turns in the chat template's text cannot be "
                "determined"
            )
        through = template.trace(messages[: turn + 1], tools).text
        end = _common_length(through, whole.text)
        spans.append((len(prompt), _strip(whole.text, len(prompt), end)))
    return spans


def _follow(cue: str, turn: str) -> int:
    """Return the number of characters that a turn shares with its generation prompt.

    A prompt may contain more than the turn repeats: it opens a reasoning block, and the turn's
    reasoning was dropped. The common prefix may then extend into the answer by chance, so it ends
    at the last complete line or tag.
    """
    if turn.startswith(cue):
        return len(cue)
    shared = cue[: _common_length(cue, turn)]
    edges = (edge.match(shared) for edge in _EDGES)
    return next((edge.end() for edge in edges if edge), 0)


def _common_length(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _strip(text: str, start: int, end: int) -> int:
    """Move `end` back over white space, but not below `start`."""
    return start + len(text[start:end].rstrip())


def _join(spans: Iterable[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def _cover(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether it overlaps a span; both are sorted."""
    loss_mask = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for position, (start, end) in enumerate(offsets):
        while span is not None and span[1] <= start:
            span = next(remaining, None)
        if span is None:
            break
        loss_mask[position] = end > span[0]
    return loss_mask


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that can end a turn: the special ones, which plain text never produces.

    Added tokens that are not special, such as tags of tool calls, are content.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special}
    return frozenset(special | {tokenizer.eos_token_id} - {None})


def _run_ends(loss_mask: Sequence[bool]) -> list[int]:
    ends = [n for n, (now, then) in enumerate(pairwise(loss_mask)) if now and not then]
    return [*ends, len(loss_mask) - 1] if loss_mask and loss_mask[-1] else ends


def _skip_blank(
    ids: Sequence[int], position: int, tokenizer: PreTrainedTokenizerBase, step: int
) -> int:
    """Return the next position, itself included, whose token is not white space."""
    while 0 <= position < len(ids) and tokenizer.decode([ids[position]]).isspace():
        position += step
    return max(position, 0)
