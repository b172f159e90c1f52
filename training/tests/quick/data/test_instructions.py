"""What rows say of their own training: followed, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_trainer.data.examples import Chat, Completion
from lora_trainer.data.formats import to_example, unused_fields
from lora_trainer.data.instructions import SWITCHES, RowError
from lora_trainer.data.mask import mark
from lora_trainer.data.template import ChatTemplate, TemplateFault
from support.byte_tokenizer import make_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "+ message.content + '<|im_end|>\n' }}",
    "}}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
)
TEMPLATE = ChatTemplate.of(make_tokenizer(), CHATML)
SECRET = "the moon is a secret"


def turns(**first: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Capital?"},
        {"role": "assistant", "content": "Wrong.", **first},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Right."},
    ]


def example(row: dict[str, Any], format: Any = "messages") -> Chat:
    converted = to_example(row, format)
    assert isinstance(converted, Chat)
    return converted


def trained(
    chat: Chat, train_on: Any = "assistant", template: ChatTemplate = TEMPLATE
) -> list[str]:
    marked = mark(chat, template, train_on)
    return [marked.text[start:end] for start, end in marked.spans]


@pytest.mark.parametrize("field", SWITCHES)
def test_a_turn_that_says_so_is_not_trained(field):
    off = not SWITCHES[field]
    for value in (off, int(off), float(off)):
        chat = example({"messages": turns(**{field: value})})
        assert trained(chat) == ["Right.<|im_end|>"]
        assert field not in chat.messages[1]
    assert len(trained(example({"messages": turns(**{field: not off})}))) == 2


def test_a_turn_of_sharegpt_and_a_call_that_say_so_are_not_trained():
    row = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Wrong.", "weight": 0},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}}', "weight": 0},
        {"from": "gpt", "value": "Right.", "weight": None},
    ]
    chat = example({"conversations": row, "system": "Be right."}, "sharegpt")
    assert chat.muted == {2, 3}
    assert trained(
        replace(chat, messages=chat.messages[:3] + chat.messages[4:], muted=frozenset({2}))
    ) == ["Right.<|im_end|>"]


def test_a_mask_for_each_message_of_a_row_is_followed():
    row = {"messages": turns(), "loss_mask": [0, 0, 0, 1], "system": "Be right."}
    assert trained(example(row)) == ["Right.<|im_end|>"]


def test_the_marks_of_a_template_in_a_muted_turn_are_not_trained():
    marked = ChatTemplate.of(make_tokenizer(), MARKED)
    chat = example({"messages": [*turns(weight=0), *turns()]})
    assert trained(example({"messages": turns(weight=0)}), template=marked)[-1:] == [
        "Right.<|im_end|>"
    ]
    assert not any(
        "Wrong" in text for text in trained(replace(chat, muted=frozenset({1, 5})), template=marked)
    )


def test_all_trains_everything_but_the_turns_that_say_otherwise():
    chat = example({"messages": turns(weight=0)})
    texts = trained(chat, "all")
    assert "Wrong" not in "".join(texts)
    assert "Capital?" in texts[0]
    assert "Again." in texts[-1]


def test_last_whose_last_turn_is_not_to_be_trained_is_refused():
    row = turns()
    row[-1]["train"] = False
    with pytest.raises(TemplateFault, match="train_on is last"):
        trained(example({"messages": row}), "last")


def test_answers_in_a_prompt_of_messages_are_not_trained():
    row = {"prompt": turns()[:3], "completion": turns()[3:]}
    chat = example(row, "completion")
    assert trained(chat) == ["Right.<|im_end|>"]
    assert "Wrong." in trained(chat, "all")[0]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ({"weight": 0.5}, "weight' is neither 0 nor 1"),
        ({"weight": -1}, "weight' is neither 0 nor 1"),
        ({"weight": "0"}, "weight' is str"),
        ({"train": [SECRET]}, "train' is list"),
        ({"weight": 0, "train": True}, "according to its weight, but not according to its train"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
            "'train_detail'",
        ),
        ({"mask": True}, "'mask', which looks like a training instruction"),
        ({"lossWeight": 0.1}, "'lossWeight'"),
        ({"no_train": True}, "'no_train'"),
        ({"is_trainable": False}, "'is_trainable'"),
        ({"ignore": True}, "'ignore'"),
    ],
)
def test_an_instruction_that_cannot_be_followed_is_refused_by_name(first, reason):
    with pytest.raises(RowError, match=r"messages\[1\]") as caught:
        example({"messages": turns(**first)})
    assert reason in caught.value.reason
    assert SECRET not in caught.value.reason


@pytest.mark.parametrize(
    "extra",
    [
        {"id": 7, "name": "bot", "timestamp": 1.5, "score": 0.1},
        {"trainer": "me", "weight": None, "mask": None},
        {"note": {"weight": 0}, "topic": "weight loss", "training_notes": "none"},
    ],
)
def test_other_fields_of_a_turn_stay_harmless(extra):
    assert len(trained(example({"messages": turns(**extra)}))) == 2


def test_a_question_that_is_to_be_trained_is_refused_and_one_that_is_not_is_fine():
    row = turns()
    row[0]["weight"] = 0
    assert len(trained(example({"messages": row}))) == 2
    row[0]["weight"] = 1
    with pytest.raises(RowError, match="not the assistant's"):
        example({"messages": row})


def test_a_row_whose_answers_all_say_no_is_refused():
    with pytest.raises(RowError, match="every assistant turn"):
        example({"messages": turns(weight=0)[:2]})


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"label": False}, "'label' is false"),
        ({"is_desirable": False}, "'is_desirable' is false"),
        ({"images": ["a.png"]}, "'images' contains media"),
        ({"image": "a.png"}, "'image' contains media"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"completion_mask": [0, 1]}, "'completion_mask' masks tokens"),
        ({"assistant_masks": [0, 1]}, "'assistant_masks' masks tokens"),
        ({"loss_mask": [0, 1]}, "one entry for each of 4 turns"),
        ({"loss_mask": 1}, "one entry for each of 4 turns"),
        ({"system": "Be loud.", "first": {"role": "system", "content": "Be quiet."}}, "differ"),
    ],
)
def test_a_row_that_would_be_trained_as_what_it_is_not_is_refused(extra, reason):
    first = [extra.pop("first")] if "first" in extra else []
    with pytest.raises(RowError) as caught:
        example({"messages": [*first, *turns()], **extra})
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "extra",
    [{"label": True}, {"label": 0}, {"images": [], "image": None, "video": ""}, {"label": "x"}],
)
def test_other_fields_of_a_row_stay_harmless(extra):
    assert len(trained(example({"messages": turns(), **extra}))) == 2


def test_a_question_keeps_its_context_and_its_system_prompt():
    row = {
        "question": "Who?",
        "context": "Ann came.",
        "answer": "Ann.",
        "system_prompt": "Be brief.",
    }
    contents = [message["content"] for message in example(row, "alpaca").messages]
    assert contents == ["Be brief.", "Who?\nAnn came.", "Ann."]
    contents = [m["content"] for m in example({**row, "context": {"a": 1}}, "alpaca").messages]
    assert contents == ["Be brief.", "Who?", "Ann."]


@pytest.mark.parametrize("field", ["system", "system_prompt", "input", "context"])
def test_a_completion_that_would_lose_a_part_of_its_prompt_is_refused(field):
    row = {"prompt": "a", "completion": "b", field: SECRET}
    with pytest.raises(RowError, match=f"'{field}' is not allowed"):
        to_example(row, "completion")
    assert to_example({**row, field: ""}, "completion") == Completion("a", "b")


def test_tools_of_an_instruction_are_kept():
    row = {"instruction": "a", "output": "b", "tools": [{"name": "look"}]}
    assert example(row, "alpaca").tools == ({"name": "look"},)


def test_functions_are_tools_in_openais_older_spelling():
    row = {"messages": turns(), "functions": [{"name": "look"}]}
    assert example(row).tools == ({"type": "function", "function": {"name": "look"}},)


def test_fields_without_a_use_are_named():
    rows = [{"instruction": "a", "context": "b", "response": "c", "category": "d", "empty": ""}]
    assert unused_fields(rows, "alpaca", {}) == ["'category'"]
    assert unused_fields([{"messages": turns(), "id": 1}], "messages", {}) == ["'id'"]
    assert unused_fields(["line"], "text", {}) == []
