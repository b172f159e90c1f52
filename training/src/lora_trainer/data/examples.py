"""The one shape that every dataset format is brought to, and what a tokenized example is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in OpenAI's messages form, as chat templates take it.

    `messages` hold role (system, user, assistant, tool, ...), content and, where
    the row has them, tool_calls and further fields, untouched for the template.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


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
    is_trained: list[bool]
