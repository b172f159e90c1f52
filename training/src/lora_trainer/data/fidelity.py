"""Compare a conversation with the text of its chat template: losses and changes.

Lost answers, tool calls and tools are errors. Other changes are counted over the rows, because
templates make them on purpose: reasoning of earlier turns, system prompts, white space.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..config.named_templates import fitting
from .examples import Change, Chat
from .template import ChatTemplate, Rendering, Span, TemplateFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHECKED_CHARACTERS = 20
_THOUGHTS_END = re.compile(r"</think(?:ing)?>|\[/THINK\]")
_THOUGHTS_TAG = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thoughts")
_PROBE = "probe4817"
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_WORDS = 5  # longer than any role or tag
_NO_ANSWER = "the chat template drops the content of an assistant turn"


def changes_of(
    chat: Chat,
    turns: Sequence[int],
    whole: Rendering,
    spans: Sequence[Span],
    template: ChatTemplate,
) -> tuple[Change, ...]:
    """Return how the text differs from the conversation, in supervised turns and in prompts."""
    changes: set[Change] = set()
    for turn in turns:
        pieces = whole.pieces_of(turn) if whole.is_traced else whole.pieces
        text = "".join(whole.text[piece.start : piece.end] for piece in pieces)
        supervised = whole.written_by(turn, spans)
        changes |= _changes_of_answer(chat.messages[turn], text, supervised, template)
    squeezed = ""
    for message in chat.messages:
        content = message.get("content")
        if message.get("role") == "assistant" or not isinstance(content, str):
            continue
        if content.strip() in whole.text:
            continue
        squeezed = squeezed or _squeezed(whole.text)
        if _squeezed(content) not in squeezed:
            is_system = message.get("role") in ("system", "developer")
            changes.add(Change.SYSTEM_DROPPED if is_system else Change.QUESTION_CHANGED)
    has_own = chat.messages[0].get("role") in ("system", "developer")
    if _system_prompts(template)[has_own]:
        changes.add(Change.SYSTEM_ADDED)
    return tuple(sorted(changes, key=lambda change: change.name))


def _changes_of_answer(
    answer: dict[str, Any], text: str, supervised: str, template: ChatTemplate
) -> set[Change]:
    """Compare an answer with the template's text for it and with the supervised part of that."""
    content = answer.get("content")
    content = content if isinstance(content, str) else ""
    before, _, words = _split_thoughts(content)
    fields = (answer.get(field) for field in _REASONING_FIELDS)
    thoughts = [text.strip() for text in (before, *fields) if isinstance(text, str)]
    changes: set[Change] = set()
    if not all(_is_in(thought, text) for thought in thoughts):
        changes.add(Change.THOUGHTS_DROPPED)
    if not _is_in(words.strip(), text):
        # Some templates treat words beside a tool call as reasoning and drop them.
        is_call = bool(answer.get("tool_calls"))
        changes.add(Change.THOUGHTS_DROPPED if is_call else Change.WORDS_DROPPED)
    elif not any(thoughts) and content not in text and content.strip() in text:
        changes.add(Change.SPACE_STRIPPED)
    is_compared = not answer.get("tool_calls") and Change.WORDS_DROPPED not in changes
    if is_compared and (added := _added(supervised, [*thoughts, words.strip()], template)):
        changes.add(added)
    return changes


def _is_in(own: str, text: str) -> bool:
    """Return whether a text contains another one, ignoring white space."""
    return own in text or _squeezed(own) in _squeezed(text)


def _split_thoughts(content: str) -> tuple[str, str, str]:
    """Return an answer's reasoning without its tags, the closing tag, and the text after it."""
    ends = list(_THOUGHTS_END.finditer(content))
    if not ends:
        return "", "", content
    end = ends[-1]
    return _THOUGHTS_TAG.sub(" ", content[: end.start()]), end[0], content[end.end() :]


def _added(supervised: str, own: Sequence[str], template: ChatTemplate) -> Change | None:
    """Return what is supervised besides the answer and special tokens, or None."""
    supervised = supervised.replace("\0", " ")
    if _rest_of(_plain(supervised, template), sorted(own, key=len, reverse=True)):
        squeezed = [_squeezed(_plain(text, template)) for text in own]
        longest_first = sorted(squeezed, key=len, reverse=True)
        if _rest_of(_squeezed(_plain(supervised, template)), longest_first):
            return Change.WORDS_ADDED
    *thoughts, words = own
    has_block = _THOUGHTS_TAG.search(supervised) and not _THOUGHTS_TAG.search(words)
    return Change.THOUGHTS_ADDED if has_block and not any(thoughts) else None


def _rest_of(text: str, known: Sequence[str]) -> str:
    """Return a text after removing each known string once."""
    for one in filter(None, known):
        text = text.replace(one, " ", 1)
    return text.strip()


def _plain(text: str, template: ChatTemplate) -> str:
    """Return text with special tokens and reasoning tags replaced by spaces."""
    return _THOUGHTS_TAG.sub(" ", _without_special_tokens(template.tokenizer, text))


@lru_cache(maxsize=8)
def _system_prompts(template: ChatTemplate) -> tuple[bool, bool]:
    """Return whether a template writes a system prompt: for rows without one, for rows with one."""
    own = {"role": "system", "content": _PROBE}
    return _adds_sentences(template, []), _adds_sentences(template, [own])


def _adds_sentences(template: ChatTemplate, before: Sequence[dict[str, Any]]) -> bool:
    return len(_WORD.findall(_before_question(template, before))) >= _SENTENCE_WORDS


def _before_question(template: ChatTemplate, before: Sequence[dict[str, Any]]) -> str:
    """Return what a template writes before a question: role names, and text of its own."""
    probe = [*before, {"role": "user", "content": _PROBE}]
    try:
        text = template.trace(*template.normalize(probe)).text
    except TemplateFault:
        return ""
    text = _without_special_tokens(template.tokenizer, text[: text.rfind(_PROBE)])
    return text.replace(_PROBE, "")


def default_system_prompt(template: ChatTemplate) -> str:
    """Return the system prompt that a template writes where a row has none, "" without one."""
    text = _before_question(template, [])
    lines = [line.strip() for line in text.splitlines()]
    sentences = [line for line in lines if len(_WORD.findall(line)) >= _SENTENCE_WORDS]
    if len(_WORD.findall(text)) < _SENTENCE_WORDS:
        return ""
    return " ".join(sentences) or _squeezed(text)


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return text with each special token replaced by a space."""
    pattern = _special_pattern(tokenizer)
    return pattern.sub(" ", text) if pattern else text


@lru_cache(maxsize=8)
def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} - {""}
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special else None


def _squeezed(text: str) -> str:
    """Return text with runs of white space collapsed to one space."""
    return " ".join(text.split())


def check_tools(chat: Chat, whole: Rendering, template: ChatTemplate) -> None:
    """Reject a text that names none of the tools outside tool calls."""
    names = {name for tool in chat.tools if (name := _function_name(tool))}
    callers = {n for n, m in enumerate(chat.messages) if m.get("role") in ("assistant", "tool")}
    texts = [whole.text[p.start : p.end] for p in whole.pieces if p.owner not in callers]
    if names and not any(name in text for name in names for text in texts):
        raise TemplateFault(
            f"the chat template does not write the tools: {_remedy(template.tokenizer)}"
        )


def check_answer(
    answer: dict[str, Any], text: str, spans: Sequence[Span], own: str, template: ChatTemplate
) -> None:
    """Reject a turn whose supervised text lacks a tool call or the assistant's content."""
    content = answer.get("content")
    content = content.strip() if isinstance(content, str) else ""
    calls = Counter(map(_function_name, answer.get("tool_calls") or ()))
    # The turn's content may mention a function, too.
    texts = [value for key, value in answer.items() if key != "role" and isinstance(value, str)]
    answers = [value for value in texts if value.strip() in own]
    for name, count in calls.items():
        written = own.count(name) - sum(value.count(name) for value in answers)
        if written < count:
            calls_lost = "every tool call of a turn" if written > 0 else "tool calls"
            raise TemplateFault(
                f"the chat template does not write {calls_lost}: {_remedy(template.tokenizer)}"
            )
    # Only the ending: a prompt may write the start of the answer's reasoning block, and templates
    # drop the reasoning of earlier turns.
    lines = _THOUGHTS_END.split(content)[-1].strip().splitlines()
    ending = lines[-1].strip()[-_CHECKED_CHARACTERS:] if lines else ""
    if ending not in own and not any(ending in text[a:b] for a, b in spans):
        if ending in text:
            raise TemplateFault(
                "the position of an assistant turn in the chat template's text cannot be determined"
            )
        # Some templates (gpt-oss) treat words beside a call as reasoning and drop them.
        if not calls:
            raise TemplateFault(_NO_ANSWER)
    if content and not own.strip():
        raise TemplateFault(_NO_ANSWER)


@lru_cache(maxsize=8)
def _remedy(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the templates with tool calls that this tokenizer has the markers of."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    names = " or ".join(fitting(added))
    return f"set chat_template to {names or 'a Jinja file that does'}"


def _function_name(entry: Any) -> str:
    """Return the name in a tool's description or in a tool call, "" if it has none."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
