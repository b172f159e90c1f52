"""The one shape that every dataset format is brought to, and what a tokenized example is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Change(Enum):
    """A difference between a row and the text that is made of it."""

    THOUGHTS_DROPPED = "the chat template leaves out the reasoning of an answer"
    WORDS_DROPPED = "the chat template leaves out or rewrites words of an answer"
    THOUGHTS_ADDED = (
        "the chat template adds an empty reasoning block to an answer, and it is trained"
    )
    WORDS_ADDED = "the chat template adds words to an answer, and they are trained"
    SPACE_STRIPPED = "the chat template strips white space around an answer"
    SYSTEM_DROPPED = "the chat template leaves out a system prompt"
    SYSTEM_ADDED = "the chat template adds a system prompt of its own"
    QUESTION_CHANGED = "the chat template leaves out or rewrites words of a question or tool result"
    START_SPELLED = "the text spells out the start token, which the tokenizer adds: it is kept once"
    END_SPELLED = "the text spells out the end token: it is kept once"
    MARKER_UNKNOWN = "the text holds a marker such as <|im_start|> that is no token of this model"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in OpenAI's messages form, as chat templates take it.

    `messages` hold role (system, user, assistant, tool, ...), content and, where
    the row has them, tool_calls and further fields, untouched for the template.
    `muted` are the numbers of turns that say of themselves not to be trained. Of the first
    `prompt_turns` messages, a row's own prompt, only `train_on: all` trains any.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    muted: frozenset[int] = frozenset()
    prompt_turns: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain prompt and the completion to learn; no chat template is involved."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, every token of which is trained."""

    text: str


Example = Chat | Completion | Text


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized example: T token ids and, for each, whether it is a target of the loss."""

    input_ids: list[int]
    loss_mask: list[bool]
    changes: tuple[Change, ...] = ()
