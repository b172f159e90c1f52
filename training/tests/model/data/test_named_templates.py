"""The chat templates that ship by name: their text, and the tokens they train.

Where TRL ships the same format, its text and its hand-marked mask are the reference. The
trained parts of the others are written out here by hand.
"""

from __future__ import annotations

from functools import cache

import pytest

from lora_trainer.config.named_templates import NAMES, fitting, text_of
from lora_trainer.data.mask import audit, encode, mark
from lora_trainer.data.template import ChatTemplate, TemplateFault
from support.template_pairs import CONVERSATIONS, FAMILIES, compare, encoded, tokenizer
from support.template_pairs import template as template_of_trl

pytestmark = [
    pytest.mark.any_stack,  # the oldest stack's TRL has no pairs of templates
    pytest.mark.skipif(not FAMILIES, reason="this TRL ships no pairs of templates"),
]
TOOLS = sorted(name for name, chat in CONVERSATIONS.items() if chat.tools)
THINKING = {name for name in CONVERSATIONS if name.startswith("thinking")}
CHATS = sorted(CONVERSATIONS.keys() - set(TOOLS))
REASONED = "<think>\nLook.\n</think>\n\n"
LOOK = '{"name": "look", "%s": {"place": "%s"}}'
CALLED = f"<tool_call>\n{LOOK % ('arguments', 'home')}\n</tool_call>"
BARN = f"<tool_call>\n{LOOK % ('arguments', 'barn')}\n</tool_call>"
OF_MISTRAL = '{"name": "look", "arguments": {"place": "%s"}, "id": "%s"}'
# What the model writes in each turn, without the token that ends it.
TRAINED = {
    "chatml": {
        "tool call": [CALLED],
        "tool result": [CALLED, "Found."],
        "two tool calls": [f"{CALLED}\n{BARN}", "In the barn."],
        "tool turns": [f"Wait.\n{CALLED}", "There.", BARN, "Lost."],
        "thinking tool result": [REASONED + CALLED, "<think>\nI see.\n</think>\n\nFound."],
    },
    "llama3": {
        "tool call": [LOOK % ("parameters", "home")],
        "tool result": [LOOK % ("parameters", "home"), "Found."],
        "tool turns": [
            "Wait.\n" + LOOK % ("parameters", "home"),
            "There.",
            LOOK % ("parameters", "barn"),
            "Lost.",
        ],
        "thinking tool result": [LOOK % ("parameters", "home"), "Found."],
    },
    "mistral": {
        "tool call": [f"[TOOL_CALLS] [{OF_MISTRAL % ('home', 'c1')}]"],
        "tool result": [f"[TOOL_CALLS] [{OF_MISTRAL % ('home', 'c1')}]", " Found."],
        "two tool calls": [
            f"[TOOL_CALLS] [{OF_MISTRAL % ('home', 'c1')}, {OF_MISTRAL % ('barn', 'c2')}]",
            " In the barn.",
        ],
        "tool turns": [
            f" Wait.[TOOL_CALLS] [{OF_MISTRAL % ('home', 'c1')}]",
            " There.",
            f"[TOOL_CALLS] [{OF_MISTRAL % ('barn', 'c1')}]",
            " Lost.",
        ],
        "thinking tool result": [f"[TOOL_CALLS] [{OF_MISTRAL % ('home', 'c1')}]", " Found."],
    },
}
TRAINED["qwen"] = TRAINED["chatml"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "<eos>", "qwen": "<|im_end|>"}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate.of(tokenizer(), text_of(name))


@pytest.mark.parametrize("conversation", TOOLS)
@pytest.mark.parametrize("name", NAMES)
def test_of_a_conversation_with_tools_exactly_what_the_model_writes_is_trained(name, conversation):
    if conversation not in TRAINED[name]:
        with pytest.raises(TemplateFault, match="one tool call in a turn"):
            mark(CONVERSATIONS[conversation], template(name), "assistant")
        return
    marked = mark(CONVERSATIONS[conversation], template(name), "assistant")
    written = [marked.text[start:end] for start, end in marked.spans]
    assert written == [turn + ENDS[name] for turn in TRAINED[name][conversation]]


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS.keys() - THINKING))
def test_qwen_is_written_and_trained_as_trl_has_it(conversation):
    pair = compare("qwen3_instruct_2507", conversation)
    marked = mark(CONVERSATIONS[conversation], template("qwen"), "assistant")
    assert (marked.text, marked.spans) == (pair.marked.text, pair.reduced)


@pytest.mark.parametrize("conversation", CHATS)
def test_chatml_and_llama3_are_written_and_trained_as_trl_has_them(conversation):
    pair = compare("llama3", conversation)
    marked = mark(CONVERSATIONS[conversation], template("llama3"), "assistant")
    assert (marked.text, marked.spans) == (pair.marked.text, pair.reduced)
    if conversation not in THINKING:
        pair = compare("qwen3_instruct_2507", conversation)  # ChatML, where there are no tools
        marked = mark(CONVERSATIONS[conversation], template("chatml"), "assistant")
        assert (marked.text, marked.spans) == (pair.marked.text, pair.reduced)


@pytest.mark.parametrize("conversation", ["tool call", "tool result", "thinking tool result"])
def test_llama3_writes_tools_as_llama_3_1_has_them(conversation):
    chat = CONVERSATIONS[conversation]
    theirs = template_of_trl("llama3_1").render(chat.messages, chat.tools, True)
    assert template("llama3").render(chat.messages, chat.tools, True) == theirs


def test_mistral_writes_tools_and_system_prompt_with_the_first_question():
    chat = CONVERSATIONS["tool turns"]
    text = template("mistral").render(chat.messages, chat.tools)
    head, _, rest = text.partition("[INST] ")
    assert head.startswith("<bos>[AVAILABLE_TOOLS] [{")
    assert head.endswith("}][/AVAILABLE_TOOLS]")
    assert rest.startswith("Be brief.\n\nWhere?[/INST] Wait.[TOOL_CALLS] [")
    assert '[TOOL_RESULTS] {"content": "here", "call_id": "c1"}[/TOOL_RESULTS] There.' in rest
    assert rest.count("AVAILABLE_TOOLS") == 0


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_is_trained_behind_the_text_that_asks_for_it(name):
    chat = CONVERSATIONS["tool turns"]
    whole = template(name).render(chat.messages, chat.tools)
    for turn, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            prompt = template(name).render(chat.messages[:turn], chat.tools, True)
            assert whole.startswith(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_the_audit_finds_no_fault_with_a_template_that_ships(name):
    for conversation, chat in CONVERSATIONS.items():
        if name == "llama3" and conversation == "two tool calls":
            continue
        example = encode(chat, tokenizer(), template(name), "assistant")
        assert not audit(chat, example, tokenizer()), conversation


def test_tokens_of_qwen_are_trained_as_those_of_trl():
    for conversation in ("turns", "tool turns", "two tool calls"):
        ours = encode(CONVERSATIONS[conversation], tokenizer(), template("qwen"), "assistant")
        assert ours == encoded("qwen3_instruct_2507", conversation), conversation


def test_the_templates_that_fit_are_those_whose_markers_are_tokens():
    assert fitting({"<|im_start|>", "<|im_end|>"}) == ["chatml", "qwen"]
    assert fitting({"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}) == ["llama3"]
    assert fitting({"[INST]", "[/INST]", "[TOOL_CALLS]"}) == ["mistral"]
    assert fitting({"<s>"}) == []


def test_a_template_without_tools_names_those_that_have_them_and_fit():
    with pytest.raises(TemplateFault, match=r"set chat_template to chatml or llama3 or qwen$"):
        mark(CONVERSATIONS["tool call"], template_of_trl("llama3"), "assistant")
