"""Convert the turns of a conversation in any common spelling to OpenAI messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .bad_rows import fault_in
from .instructions import RowError, is_instruction, is_supervised

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


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, and whether it is marked as supervised: None if it is not marked."""

    message: dict[str, Any]
    is_supervised: bool | None = None


def turns_of(value: Any, field: str) -> list[Turn]:
    """Convert a list of turns, or JSON text of one.

    Raises:
        RowError: a turn is invalid.
    """
    turns = parsed_list(value)
    if turns is None:
        raise RowError(f"field '{field}' is {type(value).__name__}, expected a list of messages")
    if not turns:
        raise RowError(f"field '{field}' is empty")
    return [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: object, field: str) -> Turn:
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
        raise RowError(f"field '{field}.{role_key}' is not one of {', '.join(ROLES)}")
    wanted = is_supervised(turn, field, is_assistant=known in ("assistant", "function_call"))
    if known == "function_call":
        calls = _tool_calls(turn.get(content_key), f"{field}.{content_key}")
        return Turn({"role": "assistant", "content": "", "tool_calls": calls}, wanted)
    # Columnar files add None for fields of other messages: treat as absent.
    taken = (role_key, content_key, "tool_calls", "function_call")
    rest = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in taken and not is_instruction(key)
    }
    message: dict[str, Any] = {"role": known, **rest}
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"], f"{field}.tool_calls")
    elif turn.get("function_call"):
        message["tool_calls"] = _tool_calls(turn["function_call"], f"{field}.function_call")
    message["content"] = _content(turn.get(content_key), f"{field}.{content_key}", message)
    return Turn(message, wanted)


def _content(value: object, field: str, message: dict[str, Any]) -> str:
    if value is None and "tool_calls" in message:
        return ""
    if isinstance(value, list) and all(isinstance(part, str | dict) for part in value):
        value = "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(value))
    if isinstance(value, dict) and message["role"] == "tool":
        value = json.dumps(value, ensure_ascii=False, default=str)
    # Tools may return nothing, and a system prompt may be empty on purpose.
    may_be_empty = message["role"] in ("tool", "system", "developer") or "tool_calls" in message
    return string_of(value, field) if may_be_empty else text_of(value, field)


def _part(part: str | dict[str, Any], field: str) -> str:
    if isinstance(part, str):
        return part
    if part.get("type", "text") != "text":
        raise RowError(f"field '{field}' is not text; only text is supported")
    return string_of(part.get("text"), f"{field}.text")


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Convert calls to {"type": "function", "function": {"name", "arguments"}}.

    Arguments become objects, as chat templates expect; OpenAI writes them as text.
    """
    calls = _parsed(value, field)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RowError(f"field '{field}' is empty")
    result = []
    for index, call in enumerate(calls):
        field_name = f"{field}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(function, dict):
            raise RowError(f"field '{field_name}' is {type(call).__name__}, expected a tool call")
        name = text_of(function.get("name"), f"{field_name}.name")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _parsed(arguments, f"{field_name}.arguments") if arguments else {}
        if not isinstance(arguments, dict):
            raise RowError(
                f"field '{field_name}.arguments' is {type(arguments).__name__}, expected an object"
            )
        rest = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        described = {"name": name, "arguments": arguments}
        result.append({**rest, "type": "function", "function": described})
    return result


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return a row's tools, or functions in OpenAI's older spelling.

    Raises:
        RowError: they are not a list of descriptions.
    """
    if not row.get("tools") and row.get("functions"):
        functions = _parsed(row["functions"], "functions")
        if not isinstance(functions, list) or not all(isinstance(f, dict) for f in functions):
            raise RowError("field 'functions' is not a list of function descriptions")
        return tuple({"type": "function", "function": function} for function in functions)
    value = row.get("tools")
    if not value:
        return ()
    tools = _parsed(value, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' is not a list of tool descriptions")
    return tuple(tools)


def _parsed(value: Any, field: str) -> Any:
    """Parse a value that may be JSON text, as in CSV cells."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"field '{field}' is not valid JSON") from None
    if fault := fault_in({field: parsed}):
        raise RowError(fault)
    return parsed


def parsed_list(value: Any) -> list[Any] | None:
    """Return a list, parsed from JSON text if necessary; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if fault_in({"": value}):
            return None
    return value if isinstance(value, list) else None


def string_of(value: Any, field: str) -> str:
    """Return a text; raises a RowError with the field if it is not text."""
    if value is None:
        raise RowError(f"field '{field}' is missing")
    if not isinstance(value, str):
        raise RowError(f"field '{field}' is {type(value).__name__}, expected a string")
    return value


def text_of(value: Any, field: str) -> str:
    """Return a non-blank text; raises a RowError with the field otherwise."""
    text = string_of(value, field)
    if not text.strip():
        raise RowError(f"field '{field}' is empty")
    return text
