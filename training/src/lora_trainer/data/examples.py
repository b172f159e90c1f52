"""The common form of rows of every dataset format, and tokenized examples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Change(Enum):
    """A difference between a row and its training text."""

    THOUGHTS_DROPPED = "the chat template drops the reasoning of an answer"
    WORDS_DROPPED = "the chat template drops or rewrites words of an answer"
    THOUGHTS_ADDED = (
        "the chat template adds an empty reasoning block to an answer, and it is supervised"
    )
    WORDS_ADDED = "the chat template adds words to an answer, and they are supervised"
    SPACE_STRIPPED = "the chat template strips white space around an answer"
    SYSTEM_DROPPED = "the chat template drops a system prompt"
    SYSTEM_ADDED = "the chat template adds a system prompt of its own"
    QUESTION_CHANGED = "the chat template drops or rewrites words of a question or tool result"
    START_SPELLED = "the text contains the start token, which the tokenizer adds: it is kept once"
    END_SPELLED = "the text contains the end token: it is kept once"
    MARKER_UNKNOWN = (
        "the text contains a marker such as <|im_start|> that is not a token of this model"
    )


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as OpenAI messages, as chat templates expect it.

    `messages` contain role (system, user, assistant, tool, ...), content and, if the row has them,
    tool_calls and further fields, unchanged for the template. `muted` are the indices of turns
    marked as not supervised. The first `prompt_turns` messages are the row's own prompt, supervised
    only with `train_on: all`.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    muted: frozenset[int] = frozenset()
    prompt_turns: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain prompt and its supervised completion, without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; every token is supervised."""

    text: str


Example = Chat | Completion | Text


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized example: T token ids, and for each whether it is a target of the loss."""

    input_ids: list[int]
    loss_mask: list[bool]
    changes: tuple[Change, ...] = ()
