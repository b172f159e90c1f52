"""Bring rows of every common dataset format to one shape, and detect which format they have.

    messages     {"messages": [{"role", "content", "tool_calls"?}], "tools"?}     OpenAI's
    sharegpt     {"conversations": [{"from", "value"}], "system"?, "tools"?}
    alpaca       {"instruction", "input"?, "output", "system"?, "history"?}; also
                 question/answer, query/response, prompt/response
    completion   {"prompt", "completion"}, both text or both lists of messages
    text         {"text"}, or a line of a .txt file

A `RowError` names the field, its type or length, never its content.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from lora_trainer.data.examples import Chat, Completion, Example, Text
from lora_trainer.data.rows import RowValue, fault_in, shown_name
from lora_trainer.errors import ConfigError, DataError

FormatName = Literal["messages", "sharegpt", "alpaca", "completion", "text"]
FORMATS: tuple[FormatName, ...] = ("messages", "sharegpt", "alpaca", "completion", "text")
ROWS_TO_DETECT = 100

STANDARD_FIELDS: dict[FormatName, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "completion": ("prompt", "completion", "tools"),
    "text": ("text",),
}
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
ANSWER_FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": ("output", "response", "completion", "answer"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "output"),
    "prompt": ("response", "answer", "output"),
}
"""The question field of an Alpaca-like row and the fields that may hold its answer."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}


class RowError(ValueError):
    """A row that does not fit its format; `reason` quotes nothing of the row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def detect_format(
    rows: Iterable[RowValue], columns: Mapping[str, str] | None = None, where: str = ""
) -> FormatName:
    """Return the format of most of the first rows.

    Raises:
        DataError: no row has a known format.
        ConfigError: `columns` names a field or a column that does not exist.
    """
    first = [row for row, _ in zip(rows, range(ROWS_TO_DETECT), strict=False)]
    check_columns(first, columns or {}, where)
    votes = Counter(
        name for row in first if (name := _format_of(renamed(row, columns or {}))) is not None
    )
    if votes:
        return votes.most_common(1)[0][0]
    names = list(dict.fromkeys(name for row in first if isinstance(row, dict) for name in row))
    found = ", ".join(shown_name(name) for name in names[:12]) or "none"
    is_preference = {"chosen", "rejected"} <= set(names)
    raise DataError.of(
        "the dataset's format is not recognised",
        where=where,
        why="preference data (chosen, rejected) is not trained on; its fields are " + found
        if is_preference
        else f"its fields are {found}",
        remedy="map its fields, such as dataset_columns: "
        + (
            '{"prompt": "prompt", "completion": "chosen"}'
            if is_preference
            else '{"instruction": "<field>", "output": "<field>"}'
        )
        + f", or set dataset_format to one of {', '.join(FORMATS)}",
    )


def check_columns(rows: Iterable[RowValue], columns: Mapping[str, str], where: str = "") -> None:
    """Refuse a column mapping that cannot be meant.

    Raises:
        ConfigError: an unknown standard field, or a column that none of the rows has.
    """
    known = {name for names in STANDARD_FIELDS.values() for name in names}
    if unknown := sorted(set(columns) - known):
        raise ConfigError.of(
            f"dataset_columns maps no field {', '.join(map(shown_name, unknown))}",
            where=where,
            remedy=f"its keys are of {', '.join(sorted(known))}",
        )
    present = {name for row in rows if isinstance(row, dict) for name in row}
    if missing := sorted(set(columns.values()) - present):
        raise ConfigError.of(
            f"dataset_columns names {', '.join(map(shown_name, missing))}, "
            "which no row looked at has",
            where=where,
            remedy=f"name one of {', '.join(sorted(map(shown_name, present))[:12])}",
        )


def to_example(
    row: RowValue, format: FormatName, columns: Mapping[str, str] | None = None
) -> Example:
    """Convert one row.

    Raises:
        RowError: a field is missing, empty or of a wrong type, or no turn can be learnt.
    """
    fields = renamed(row, columns or {})
    if isinstance(fields, str):
        if format != "text":
            raise RowError(f"is a line of text, expected an object of the format {format}")
        return Text(_text(fields, "text"))
    if format == "text":
        return Text(_text(fields.get("text"), "text"))
    if format == "completion":
        return _completion(fields)
    if format == "alpaca":
        return _alpaca(fields)
    return _conversation(fields)


def renamed(row: RowValue, columns: Mapping[str, str]) -> RowValue:
    """Return the row with mapped columns under their standard names."""
    if isinstance(row, str) or not columns:
        return row
    mapped = {name: row[column] for name, column in columns.items() if column in row}
    used = set(columns.values())
    return {**{name: value for name, value in row.items() if name not in used}, **mapped}


def _format_of(row: RowValue) -> FormatName | None:
    if isinstance(row, str):
        return "text"
    for field in CONVERSATION_FIELDS:
        turns = _parsed_list(row.get(field))
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
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [
            *_messages(prompt, "prompt"),
            *_messages(completion, "completion"),
        ]
        return _chat(messages, row, "completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError(
            f"'prompt' is a {type(prompt).__name__} and 'completion' a "
            f"{type(completion).__name__}: both must be text, or both lists of messages"
        )
    return Completion(_text(prompt, "prompt"), _text(completion, "completion"))


def _alpaca(row: dict[str, Any]) -> Chat:
    question = next(
        (name for name in ANSWER_FIELDS if _has(row, name) and _answer_field(row, name)), None
    )
    if question is None:
        missing = "output" if _has(row, "instruction") else "instruction"
        raise RowError(f"field '{missing}' is missing")
    answer = cast(str, _answer_field(row, question))
    asked = _text(row.get(question), question)
    if extra := _optional_text(row, "input"):
        asked = f"{asked}\n{extra}"
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"field 'history' is {type(history).__name__}, expected a list of pairs")
    for index, pair in enumerate(history):
        field = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"field '{field}' is not a pair of question and answer")
        messages.append({"role": "user", "content": _text(pair[0], f"{field}[0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], f"{field}[1]")})
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": _text(row.get(answer), answer)})
    return Chat(tuple(messages))


def _conversation(row: dict[str, Any]) -> Chat:
    """Convert OpenAI's messages and ShareGPT's conversations, whose turns tell them apart."""
    field = next((name for name in CONVERSATION_FIELDS if _has(row, name)), None)
    if field is None:
        raise RowError("field 'messages' is missing")
    messages = _messages(row[field], field)
    if messages[0]["role"] not in ("system", "developer"):
        messages = _system(row) + messages
    return _chat(messages, row, field)


def _chat(messages: list[dict[str, Any]], row: dict[str, Any], field: str) -> Chat:
    if all(message["role"] != "assistant" for message in messages):
        raise RowError(f"field '{field}' has no assistant turn")
    has_asked_tool = False
    for index, message in enumerate(messages):
        has_asked_tool = has_asked_tool or "tool_calls" in message
        if message["role"] == "tool" and not has_asked_tool and _is_first_reply(messages, index):
            raise RowError(f"field '{field}[{index}]' is a tool's answer before any call")
    return Chat(tuple(messages), _tools(row.get("tools")))


def _is_first_reply(messages: list[dict[str, Any]], index: int) -> bool:
    """Tell whether no assistant turn, which may hold a call as text, precedes."""
    return all(message["role"] != "assistant" for message in messages[:index])


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    text = _optional_text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    turns = _parsed_list(value)
    if turns is None:
        raise RowError(f"field '{field}' is {type(value).__name__}, expected a list of messages")
    if not turns:
        raise RowError(f"field '{field}' is empty")
    return [_message(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"field '{field}' is {type(turn).__name__}, expected an object")
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    if content_key not in turn and "content" in turn:
        content_key = "content"
    role = turn.get(role_key)
    if not isinstance(role, str):
        problem = "is missing" if role is None else f"is {type(role).__name__}, expected a string"
        raise RowError(f"field '{field}.role' {problem}")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise RowError(f"field '{field}.{role_key}' is none of {', '.join(ROLES)}")
    if known == "function_call":
        calls = _tool_calls(turn.get(content_key), f"{field}.{content_key}")
        return {"role": "assistant", "content": "", "tool_calls": calls}
    # Columnar files fill in None where other messages have a field: as if absent.
    rest = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in (role_key, content_key, "tool_calls", "function_call")
    }
    message: dict[str, Any] = {"role": known, **rest}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], f"{field}.tool_calls")
    elif turn.get("function_call"):
        message["tool_calls"] = _tool_calls(turn["function_call"], f"{field}.function_call")
    message["content"] = _content(turn.get(content_key), f"{field}.{content_key}", message)
    return message


def _content(value: Any, field: str, message: dict[str, Any]) -> str:
    if value is None and "tool_calls" in message:
        return ""
    if isinstance(value, list) and all(isinstance(part, str | dict) for part in value):
        value = "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(value))
    if isinstance(value, dict) and message["role"] == "tool":
        value = json.dumps(value, ensure_ascii=False, default=str)
    # Tools may return nothing, a system prompt may be emptied on purpose.
    may_be_empty = message["role"] in ("tool", "system", "developer") or "tool_calls" in message
    return _string(value, field) if may_be_empty else _text(value, field)


def _part(part: str | dict[str, Any], field: str) -> str:
    if isinstance(part, str):
        return part
    if part.get("type", "text") != "text":
        raise RowError(f"field '{field}' is not text; only text is trained on")
    return _string(part.get("text"), f"{field}.text")


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Bring calls to {"type": "function", "function": {"name", "arguments"}}.

    Arguments become objects, as chat templates expect them; OpenAI writes them as text.
    """
    calls = _parsed(value, field)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RowError(f"field '{field}' is empty")
    result = []
    for index, call in enumerate(calls):
        place = f"{field}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(function, dict):
            raise RowError(f"field '{place}' is {type(call).__name__}, expected a tool call")
        name = _text(function.get("name"), f"{place}.name")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _parsed(arguments, f"{place}.arguments") if arguments else {}
        if not isinstance(arguments, dict):
            raise RowError(
                f"field '{place}.arguments' is {type(arguments).__name__}, expected an object"
            )
        rest = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        described = {"name": name, "arguments": arguments}
        result.append({**rest, "type": "function", "function": described})
    return result


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if not value:
        return ()
    tools = _parsed(value, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' is not a list of tool descriptions")
    return tuple(tools)


def _parsed(value: Any, field: str) -> Any:
    """Return a value that may be written as JSON text, as in CSV cells."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"field '{field}' is not valid JSON") from None
    if fault := fault_in({field: parsed}):
        raise RowError(fault)
    return parsed


def _parsed_list(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if fault_in({"": value}):
            return None
    return value if isinstance(value, list) else None


def _optional_text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    return "" if value is None else _string(value, field).strip()


def _string(value: Any, field: str) -> str:
    if value is None:
        raise RowError(f"field '{field}' is missing")
    if not isinstance(value, str):
        raise RowError(f"field '{field}' is {type(value).__name__}, expected a string")
    return value


def _text(value: Any, field: str) -> str:
    text = _string(value, field)
    if not text.strip():
        raise RowError(f"field '{field}' is empty")
    return text
