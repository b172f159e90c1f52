"""Detect the format of rows and convert them to the common form.

    messages     {"messages": [{"role", "content", "tool_calls"?, "weight"?}], "tools"?}  OpenAI's
    sharegpt     {"conversations": [{"from", "value"}], "system"?, "tools"?}
    alpaca       {"instruction", "input"?, "output", "system"?, "history"?}; also
                 question/answer, query/response, prompt/response; context, system_prompt
    completion   {"prompt", "completion"}, both text or both lists of messages
    text         {"text"}, or a line of a .txt file
    alpaca_text  Alpaca's fields as Stanford's prompt in plain text; never detected
    alpaca_chat  the same prompt as the user's turn of a conversation; never detected

A `RowError` names the field, its type or length, never its content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from .bad_rows import RowValue, shown_name
from .columns import STANDARD_FIELDS, FormatName, check_columns, renamed, unrecognised
from .examples import Chat, Completion, Example, Text
from .instructions import RowError, masked_turns, refuse_unsupported
from .turns import Turn, parsed_list, string_of, text_of, tools_of, turns_of

ROWS_TO_DETECT = 100

INPUT_FIELDS = ("input", "context")
SYSTEM_FIELDS = ("system", "system_prompt")
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
# Stanford's: both begin and end alike.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{pair}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_PAIR = ", paired with an input that provides further context"
ANSWER_FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": ("output", "response", "completion", "answer"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "output"),
    "prompt": ("response", "answer", "output"),
}
"""The question field of an Alpaca-like row and the fields that may hold its answer."""


def detect_format(
    rows: Iterable[RowValue], columns: Mapping[str, str] | None = None, where: str = ""
) -> FormatName:
    """Return the most common format of the first rows.

    Raises:
        DataError: no row has a supported format.
        ConfigError: `columns` names a field or a column that does not exist.
    """
    first = [row for row, _ in zip(rows, range(ROWS_TO_DETECT), strict=False)]
    check_columns(first, columns or {}, where)
    votes = Counter(
        name for row in first if (name := _format_of(renamed(row, columns or {}))) is not None
    )
    if votes:
        return votes.most_common(1)[0][0]
    raise unrecognised(first, where)


def unused_fields(
    rows: Iterable[RowValue], format: FormatName, columns: Mapping[str, str]
) -> list[str]:
    """Return the fields of rows that are neither training text nor instructions."""
    unused: dict[str, None] = {}
    for row in rows:
        fields = renamed(row, columns)
        if not isinstance(fields, str):
            used = _used_fields(fields, format)
            filled = (name for name in fields if _has(fields, name) and fields[name] != "")
            unused.update(dict.fromkeys(shown_name(name) for name in filled if name not in used))
    return list(unused)


def _used_fields(row: dict[str, Any], format: FormatName) -> set[str]:
    if format in ("messages", "sharegpt"):
        conversation = next((name for name in CONVERSATION_FIELDS if _has(row, name)), "")
        return {conversation, "tools", "functions", "loss_mask", *SYSTEM_FIELDS}
    if format == "alpaca":
        question = next((n for n in ANSWER_FIELDS if _has(row, n) and _answer_field(row, n)), "")
        answer = (_answer_field(row, question) or "") if question else ""
        given = (name for name in INPUT_FIELDS if isinstance(row.get(name), str) and row[name])
        return {question, answer, "history", "tools", next(given, ""), *SYSTEM_FIELDS}
    if format == "completion":
        return {"prompt", "completion", "tools", "functions"}
    return set(STANDARD_FIELDS[format])


def to_example(
    row: RowValue, format: FormatName, columns: Mapping[str, str] | None = None
) -> Example:
    """Convert one row.

    Raises:
        RowError: a field is missing, empty or of the wrong type, or no turn can be supervised.
    """
    fields = renamed(row, columns or {})
    if isinstance(fields, str):
        if format != "text":
            raise RowError(f"is a line of text, expected an object of the format {format}")
        return Text(text_of(fields, "text"))
    if format == "text":
        return Text(text_of(fields.get("text"), "text"))
    refuse_unsupported(fields, has_turns=format in ("messages", "sharegpt"))
    if format == "completion":
        return _completion(fields)
    if format == "alpaca":
        return _alpaca(fields)
    if format == "alpaca_text":
        return _alpaca_text(fields)
    if format == "alpaca_chat":
        asked = _alpaca_text(fields)
        turns = (("user", asked.prompt), ("assistant", asked.completion))
        return Chat(tuple({"role": role, "content": text} for role, text in turns))
    return _conversation(fields)


def _format_of(row: RowValue) -> FormatName | None:
    if isinstance(row, str):
        return "text"
    for field in CONVERSATION_FIELDS:
        turns = parsed_list(row.get(field))
        if turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "messages"
    if _has(row, "prompt") and _has(row, "completion"):
        return "completion"
    if any(_has(row, name) and _answer_field(row, name) for name in ANSWER_FIELDS):
        return "alpaca"
    return "text" if _has(row, "text") else None


def _has(row: dict[str, Any], field: str) -> bool:
    return row.get(field) is not None


def _answer_field(row: dict[str, Any], question: str) -> str | None:
    return next((name for name in ANSWER_FIELDS[question] if name in row), None)


def _completion(row: dict[str, Any]) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    for field in (*SYSTEM_FIELDS, *INPUT_FIELDS):
        if isinstance(row.get(field), str) and row[field].strip():
            raise RowError(f"field '{field}' is not allowed with a completion: put it in 'prompt'")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = turns_of(prompt, "prompt")
        turns = [*asked, *turns_of(completion, "completion")]
        return _chat(turns, row, "completion", prompt_turns=len(asked))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            f"'prompt' is a {type(prompt).__name__} and 'completion' a "
            f"{type(completion).__name__}: both must be text, or both lists of messages"
        )
    return Completion(text_of(prompt, "prompt"), text_of(completion, "completion"))


def _alpaca(row: dict[str, Any]) -> Chat:
    question = next(
        (name for name in ANSWER_FIELDS if _has(row, name) and _answer_field(row, name)), None
    )
    if question is None:
        missing = "output" if _has(row, "instruction") else "instruction"
        raise RowError(f"field '{missing}' is missing")
    answer = cast(str, _answer_field(row, question))
    asked = text_of(row.get(question), question)
    if extra := _optional_text(row, *INPUT_FIELDS):
        asked = f"{asked}\n{extra}"
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"field 'history' is {type(history).__name__}, expected a list of pairs")
    for index, pair in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"field '{field}' is not a pair of question and answer")
        messages.append({"role": "user", "content": text_of(pair[0], f"{field}[0]")})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"{field}[1]")})
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": text_of(row.get(answer), answer)})
    return Chat(tuple(messages), tools_of(row))


def _alpaca_text(row: dict[str, Any]) -> Completion:
    instruction = text_of(row.get("instruction"), "instruction")
    extra = "" if row.get("input") is None else string_of(row["input"], "input")
    prompt = ALPACA_PROMPT.format(
        pair=ALPACA_PAIR if extra else "",
        instruction=instruction,
        input=f"### Input:\n{extra}\n\n" if extra else "",
    )
    return Completion(prompt, text_of(row.get("output"), "output"))


def _conversation(row: dict[str, Any]) -> Chat:
    """Convert OpenAI messages and ShareGPT conversations, recognised by their turns."""
    field = next((name for name in CONVERSATION_FIELDS if _has(row, name)), None)
    if field is None:
        raise RowError("field 'messages' is missing")
    turns = turns_of(row[field], field)
    masked = masked_turns(row, len(turns))
    turns = [replace(t, is_supervised=False) if n in masked else t for n, t in enumerate(turns)]
    system = _system(row)
    first = turns[0].message
    if first["role"] not in ("system", "developer"):
        turns = [*map(Turn, system), *turns]
    elif system and system[0]["content"] != first["content"].strip():
        raise RowError(f"its system field and the system turn in '{field}' differ: keep one")
    return _chat(turns, row, field)


def _chat(turns: list[Turn], row: dict[str, Any], field: str, prompt_turns: int = 0) -> Chat:
    messages = [turn.message for turn in turns]
    muted = frozenset(n for n, turn in enumerate(turns) if turn.is_supervised is False)
    answers = [turn for turn in turns[prompt_turns:] if turn.message["role"] == "assistant"]
    if not answers:
        raise RowError(f"field '{field}' has no assistant turn")
    if all(turn.is_supervised is False for turn in answers):
        raise RowError(f"field '{field}' marks every assistant turn as not supervised")
    has_asked_tool = False
    for index, message in enumerate(messages):
        has_asked_tool = has_asked_tool or "tool_calls" in message
        if message["role"] == "tool" and not has_asked_tool and _is_first_reply(messages, index):
            raise RowError(f"field '{field}[{index}]' is a tool result before any tool call")
    return Chat(tuple(messages), tools_of(row), muted, prompt_turns)


def _is_first_reply(messages: list[dict[str, Any]], index: int) -> bool:
    """Return whether no assistant turn, which may contain a call as text, comes before."""
    return all(message["role"] != "assistant" for message in messages[:index])


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    text = _optional_text(row, *SYSTEM_FIELDS)
    return [{"role": "system", "content": text}] if text else []


def _optional_text(row: dict[str, Any], field: str, other: str) -> str:
    """Return a field's text, or else the value of another field."""
    text = "" if row.get(field) is None else string_of(row[field], field).strip()
    also = row.get(other)
    return text or (also.strip() if isinstance(also, str) else "")
