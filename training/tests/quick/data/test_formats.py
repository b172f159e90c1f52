"""Formats: what each row becomes, what is refused and in which words, what is detected."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_trainer.config.arguments import read_arguments
from lora_trainer.data.columns import FORMATS, STANDARD_FIELDS
from lora_trainer.data.examples import Chat, Completion, Text
from lora_trainer.data.fingerprint import example_hash
from lora_trainer.data.formats import detect_format, to_example
from lora_trainer.data.instructions import RowError
from lora_trainer.errors import ConfigError, DataError, TrainerError

SECRET = "the moon is a secret"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
PLAIN = Chat((USER, ANSWER))
CALL = {"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ("", "Below is an instruction that describes a task. Write a response that appropriately "
         "completes the request.\n\n### Instruction:\nAdd\n\n### Response:\n"),
        ("1 2", "Below is an instruction that describes a task, paired with an input that provides "
         "further context. Write a response that appropriately completes the request.\n\n"
         "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"),
    ],
)  # fmt: skip
def test_alpaca_rows_can_be_written_as_stanfords_prompt(extra, prompt):
    row = {"instruction": "Add", "input": extra, "output": "3"}
    assert to_example(row, "alpaca_text") == Completion(prompt, "3")
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": "3"})
    assert to_example(row, "alpaca_chat") == Chat(turns)


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("messages", {"messages": [USER, ANSWER]}, PLAIN),
        ("messages", {"messages": json.dumps([USER, ANSWER])}, PLAIN),
        ("messages", {"conversations": [USER, ANSWER]}, PLAIN),
        ("messages", {"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER]}, PLAIN),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                    ANSWER,
                ]
            },
            PLAIN,
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            PLAIN,
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "Hello"}], "system": "Be kind"},
            Chat(({"role": "system", "content": "Be kind"}, ANSWER)),
        ),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "system": None}, PLAIN),
        ("alpaca", {"question": "Hi", "answer": "Hello"}, PLAIN),
        ("alpaca", {"prompt": "Hi", "response": "Hello"}, PLAIN),
        (
            "alpaca",
            {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
            Chat(
                (
                    USER,
                    ANSWER,
                    {"role": "user", "content": "Add\n1 2"},
                    {"role": "assistant", "content": "3"},
                )
            ),
        ),
        ("completion", {"prompt": "Hi", "completion": "Hello"}, Completion("Hi", "Hello")),
        (
            "completion",
            {"prompt": [USER], "completion": [ANSWER]},
            Chat((USER, ANSWER), prompt_turns=1),
        ),
        ("text", {"text": "Hi"}, Text("Hi")),
        ("text", "Hi", Text("Hi")),
    ],
)
def test_a_row_is_detected_and_converted(format, row, expected):
    assert detect_format([row]) == format
    assert to_example(row, format) == expected


@pytest.mark.parametrize("arguments", [{"on": True}, '{"on": true}'])
def test_tool_calls_come_out_as_templates_expect_them(arguments):
    call = {"id": "c1", "function": {"name": "lamp", "arguments": arguments}}
    tools = [{"type": "function", "function": {"name": "lamp"}}]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": {"ok": 1}, "tool_call_id": "c1"},
        ANSWER,
    ]
    chat = to_example({"messages": messages, "tools": json.dumps(tools)}, "messages")
    assert chat.messages[1]["tool_calls"] == [{"id": "c1", **CALL}]
    assert chat.messages[1]["content"] == ""
    assert chat.messages[2]["content"] == '{"ok": 1}'
    assert chat.tools == tuple(tools)


def test_a_sharegpt_function_call_becomes_a_tool_call():
    turns = [
        {"from": "human", "value": "Lamp on"},
        {"from": "function_call", "value": '{"name": "lamp", "arguments": {"on": true}}'},
        {"from": "observation", "value": "done"},
        {"from": "gpt", "value": "It is on"},
    ]
    messages = to_example({"conversations": turns}, "sharegpt").messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [CALL]


def test_fields_beyond_role_and_content_reach_the_template():
    turn = {**ANSWER, "reasoning_content": "think"}
    assert to_example({"messages": [USER, turn]}, "messages").messages[1] == turn


def test_mapped_columns_take_the_place_of_standard_ones():
    row = {"ask": "Hi", "reply": "Hello", "prompt": "unused"}
    columns = {"prompt": "ask", "completion": "reply"}
    assert detect_format([row], columns) == "completion"
    assert to_example(row, "completion", columns) == Completion("Hi", "Hello")


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("text", {"text": "  \n"}, "field 'text' is empty"),
        ("text", {"other": SECRET}, "field 'text' is missing"),
        ("text", {"text": 7}, "field 'text' is int, expected a string"),
        ("messages", SECRET, "is a line of text"),
        ("messages", {"messages": []}, "field 'messages' is empty"),
        ("messages", {"messages": SECRET}, "field 'messages' is str, expected a list"),
        ("messages", {"messages": [USER]}, "has no assistant turn"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "is empty"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "content' is missing"),
        ("messages", {"messages": [{"role": "user", "content": 5}, ANSWER]}, "[0].content' is int"),
        ("messages", {"messages": [{"role": SECRET, "content": "x"}, ANSWER]}, "is not one of"),
        ("messages", {"messages": [{"content": SECRET}, ANSWER]}, "[0].role' is missing"),
        ("messages", {"messages": [SECRET, ANSWER]}, "messages[0]' is str, expected an object"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "only text is supported",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "tool", "content": SECRET}, ANSWER]},
            "a tool result before any tool call",
        ),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": SECRET}]}]},
            "arguments' is not valid JSON",
        ),
        ("messages", {"messages": [USER, ANSWER], "tools": SECRET}, "'tools' is not valid JSON"),
        ("messages", {"messages": [USER, ANSWER], "tools": [SECRET]}, "'tools' is not a list of"),
        ("alpaca", {"instruction": SECRET}, "field 'output' is missing"),
        ("alpaca", {"instruction": SECRET, "output": None}, "field 'output' is missing"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [SECRET]}, "is not a pair"),
        ("completion", {"prompt": SECRET, "completion": ""}, "field 'completion' is empty"),
        ("completion", {"prompt": [USER], "completion": SECRET}, "both must be text"),
    ],
)
def test_a_bad_row_is_described_by_field_and_type_and_never_quoted(format, row, reason):
    with pytest.raises(RowError) as caught:
        to_example(row, format)
    assert reason in caught.value.reason
    assert SECRET not in caught.value.reason


def test_the_format_of_most_rows_wins():
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert detect_format(rows) == "completion"


def test_an_unknown_format_is_refused_with_the_fields_and_a_remedy():
    with pytest.raises(DataError) as caught:
        detect_format([{"foo": SECRET, "bar": 1}], where="d.jsonl")
    block = caught.value.block()
    assert "'foo', 'bar'" in block
    assert "dataset_columns" in block
    assert SECRET not in block


def test_preference_data_is_refused_by_name():
    with pytest.raises(DataError, match="not recognised") as caught:
        detect_format([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert '"completion": "chosen"' in caught.value.block()


@pytest.mark.parametrize(
    ("columns", "words"),
    [({"promt": "a"}, "maps unknown fields: 'promt'"), ({"prompt": "b"}, "names 'b'")],
)
def test_a_column_mapping_that_cannot_be_meant_is_refused(columns, words):
    with pytest.raises(ConfigError, match=words):
        detect_format([{"a": "x"}], columns)


def test_examples_that_say_the_same_have_the_same_hash():
    first = to_example({"messages": [USER, ANSWER]}, "messages")
    second = to_example({"instruction": " hi ", "output": "HELLO\n"}, "alpaca")
    third = to_example({"instruction": "hi", "output": "goodbye"}, "alpaca")
    assert example_hash(first) == example_hash(second) != example_hash(third)


def test_a_completion_and_a_text_of_the_same_words_differ():
    assert example_hash(Completion("a", "b")) != example_hash(Text("a b"))


TURN_FIELDS = ("role", "content", "from", "value", "tool_calls", "function", "name", "arguments")
names = st.sampled_from(
    sorted({*TURN_FIELDS, *(name for fields in STANDARD_FIELDS.values() for name in fields)})
)
words = st.sampled_from(["user", "assistant", "gpt", "human", "function_call", "tool", "text", ""])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(names | st.text(max_size=3), inner, max_size=4)
        | inner.map(json.dumps)
    ),
    max_leaves=20,
)
rows = st.dictionaries(names, values, max_size=5) | st.text(max_size=9)
turns = st.fixed_dictionaries(
    {}, optional={"role": words, "content": values, "from": words, "value": values,
                  "tool_calls": values}
)  # fmt: skip
likely_rows = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(turns, max_size=3) | values, "tools": values,
                  "conversations": st.lists(turns, max_size=3), "system": values}
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=rows | likely_rows, format=st.sampled_from(FORMATS))
def test_no_row_raises_anything_but_a_row_error(row, format):
    try:
        example = to_example(row, format)
    except RowError:
        return
    example_hash(example)
    if isinstance(example, Chat):
        assert any(message["role"] == "assistant" for message in example.messages)
        assert all(isinstance(message["content"], str) for message in example.messages)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=st.lists(rows | likely_rows, max_size=4), columns=st.dictionaries(names, names))
def test_no_rows_make_detection_raise_anything_but_our_own_errors(first, columns):
    try:
        assert detect_format(first, columns) in FORMATS
    except TrainerError as error:
        assert error.exit_code in (65, 78)


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"Question": "a", "Answer": "b"}, {"instruction": "Question", "output": "Answer"}),
        ({"id": 1, "Reply": "b", "User": "a"}, {"instruction": "User", "output": "Reply"}),
        (
            {"Question": "a", "Context": "c", "Best Answer": "b"},
            {"instruction": "Question", "input": "Context", "output": "Best Answer"},
        ),
        ({"Frage": "a", "L\u00f6sung": "b"}, {"instruction": "Frage", "output": "L\u00f6sung"}),
        ({"it's": "a", 'a "b"': "b"}, {"instruction": "it's", "output": 'a "b"'}),
        ({"title": "a", "body": "b"}, {"text": "body"}),
        ({"line": "a"}, {"text": "line"}),
        ({"dialogue": [{"role": "user"}], "x": "y"}, {"messages": "dialogue"}),
    ],
)
def test_rows_of_no_format_name_the_flag_with_their_own_columns(row, mapping):
    with pytest.raises(DataError) as caught:
        detect_format([row])
    (problem,) = caught.value.problems
    *_, flag, value = shlex.split(problem.remedy)
    assert flag == "--dataset_columns"
    assert read_arguments([flag, value]).given["dataset_columns"].value == mapping
    for name in FORMATS:
        assert f"{name} ({', '.join(STANDARD_FIELDS[name])})" in problem.why


def test_a_line_of_data_in_the_place_of_a_header_is_not_proposed_as_a_column():
    with pytest.raises(DataError) as caught:
        detect_format([{SECRET * 4: "a"}])
    assert "<column>" in caught.value.problems[0].remedy
