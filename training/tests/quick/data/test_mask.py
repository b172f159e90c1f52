"""Templates and masks of examples, over templates that write turns in unusual ways."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.data.examples import Chat, Completion, Encoded, Text
from lora_trainer.data.mask import Flaw, audit, encode, end_tokens, mark
from lora_trainer.data.template import ChatTemplate, TemplateFault
from lora_trainer.errors import ConfigError
from support.byte_tokenizer import make_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt is written inside of the loop.
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}"
)
# Messages are taken by their position.
BY_POSITION = (
    "{% for i in range(messages | length) %}{% set message = messages[i] %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The loop runs inside of a macro, so that all text comes at once.
IN_MACRO = "{% macro chat() %}" + CHATML.replace("{% if add", "{% endmacro %}{{ chat() }}{% if add")
# The system turn is folded into the first user turn; there is no generation prompt.
FOLDED = (
    "{% if messages[0].role == 'system' %}"
    "{% set rest = messages[1:] %}{% set lead = messages[0].content + '\n\n' %}"
    "{% else %}{% set rest = messages %}{% set lead = '' %}{% endif %}"
    "{% for message in rest %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (lead if loop.first else '') }}"
    "{{ message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Tools are put in front of the last question only.
TOOLS_LAST = (
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% if message == questions[-1] and tools %}{{ '[TOOLS]' + tools | tojson }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
# Tools stand first, calls behind the words of their turn; `loop.first` keeps one call only.
WITH_CALLS = (
    "{% for tool in tools or [] %}{{ '[TOOL]' + tool.function.name + '\n' }}{% endfor %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST_CALL = WITH_CALLS.replace("{{ '<call>'", "{{ '' if not loop.first else '<call>'")
CALLS_WITHOUT_WORDS = WITH_CALLS.replace(
    "+ message.content }}", "+ ('' if message.tool_calls else message.content) }}"
)
WITHOUT_THOUGHTS = CHATML.replace(
    "message.content", "message.content.split('</think>')[-1].strip()"
)
LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}
# The token that ends a turn is marked as not generated: a common mistake.
MARKED_SHORT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
PARTS_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)


TOKENIZER = make_tokenizer()


def template(source: str) -> ChatTemplate:
    return ChatTemplate.of(TOKENIZER, source)


def chat(*contents: str, system: str | None = None, tools: tuple[dict[str, Any], ...] = ()) -> Chat:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Chat(tuple(messages), tools)


def trained_texts(conversation: Chat, source: str, train_on: Any = "assistant") -> list[str]:
    marked = mark(conversation, template(source), train_on)
    return [marked.text[start:end] for start, end in marked.spans]


def trained(encoded: Encoded, tokenizer: Any = TOKENIZER) -> str:
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    return tokenizer.decode([number for number, loss_mask in pairs if loss_mask])


TURNS = chat("Hi", "One.", "More", "Two.")


@pytest.mark.parametrize("source", [CHATML, BY_POSITION, IN_MACRO])
def test_answers_are_trained_with_the_token_that_ends_them(source: str) -> None:
    assert trained_texts(TURNS, source) == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_prompt_written_inside_the_loop_is_not_trained() -> None:
    assert trained_texts(TURNS, ZEPHYR) == ["One.</s>", "Two.</s>"]


def test_system_text_folded_into_a_question_is_not_trained() -> None:
    conversation = chat("Hi", "One.", "More", "Two.", system="Be brief.")
    assert trained_texts(conversation, FOLDED) == [" One. </s>", " Two. </s>"]


def test_tools_written_before_the_last_question_do_not_shift_the_mask() -> None:
    conversation = chat("Hi", "One.", "More", "Two.", tools=({"name": "look"},))
    assert trained_texts(conversation, TOOLS_LAST) == ["One.</s>", "Two.</s>"]


def test_last_trains_the_last_answer_only() -> None:
    assert trained_texts(TURNS, CHATML, "last") == ["Two.<|im_end|>"]


def test_last_trains_the_last_marked_answer_only() -> None:
    assert trained_texts(TURNS, MARKED_SHORT, "last") == ["Two."]


def test_all_trains_every_token_of_a_conversation() -> None:
    assert all(encode(TURNS, TOKENIZER, template(CHATML), "all").loss_mask)


def test_question_that_equals_the_answer_is_not_trained() -> None:
    encoded = encode(chat("same", "same"), TOKENIZER, template(CHATML), "assistant")
    assert trained(encoded) == "same<|im_end|>"


def test_conversation_that_the_assistant_opens_is_trained_from_its_first_word() -> None:
    opened = Chat(({"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hi"}))
    assert trained_texts(opened, CHATML) == ["Hello.<|im_end|>"]


def test_opening_that_the_template_refuses_by_itself_still_finds_the_first_answer() -> None:
    source = "{% if messages | length < 2 and messages[0].role != 'user' %}"
    source += "{{ raise_exception('No question') }}{% endif %}" + CHATML
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "One."}
    opened = Chat((system, answer, {"role": "user", "content": "Hi"}))
    assert trained_texts(opened, source) == ["One.<|im_end|>"]


def test_answer_that_begins_like_the_rest_of_the_prompt_is_trained_whole() -> None:
    source = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    assert trained_texts(chat("Hi", "<b>x</b>"), source) == ["<b>x</b><|im_end|>"]


def has_no_token(text: str) -> bool:
    return not any(token in text for token in ("<|im_start|>", "<|im_end|>", "</s>"))


@given(st.lists(st.text(max_size=30).filter(has_no_token), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_answer_is_trained_exactly(contents: list[str]) -> None:
    texts = trained_texts(chat(*contents), CHATML)
    assert texts == [answer + "<|im_end|>" for answer in contents[1::2]]


def test_template_adds_its_own_first_token_and_the_tokenizer_none() -> None:
    tokenizer = make_tokenizer("<s> $A")
    encoded = encode(chat("Hi", "x"), tokenizer, ChatTemplate.of(tokenizer, FOLDED), "assistant")
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_completion_trains_the_completion_and_an_end() -> None:
    encoded = encode(Completion("Q: ", "yes"), TOKENIZER, None, "assistant")
    assert trained(encoded) == "yes</s>"


def test_completion_gets_the_first_token_that_the_tokenizer_adds() -> None:
    tokenizer = make_tokenizer("<s> $A")
    encoded = encode(Completion("", "yes"), tokenizer, None, "last")
    assert tokenizer.decode(encoded.input_ids) == "<s>yes</s>"


def test_end_that_the_tokenizer_adds_is_not_doubled_and_is_trained() -> None:
    tokenizer = make_tokenizer("$A </s>")
    encoded = encode(Completion("Q: ", "yes"), tokenizer, None, "assistant")
    assert trained(encoded, tokenizer) == "yes</s>"


def test_token_across_the_edge_of_a_completion_is_trained() -> None:
    encoded = encode(Completion("xa", "bc"), TOKENIZER, None, "assistant")
    assert trained(encoded) == "abc</s>"


def test_every_byte_of_a_trained_character_is_trained() -> None:
    encoded = encode(chat("é", "é"), TOKENIZER, template(CHATML), "assistant")
    assert trained(encoded) == "é<|im_end|>"


def test_all_trains_the_prompt_of_a_completion_too() -> None:
    assert all(encode(Completion("Q: ", "yes"), TOKENIZER, None, "all").loss_mask)


@pytest.mark.parametrize(
    ("example", "meant"),
    [
        (Completion("Q: ", "yes"), "assistant"),
        (Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})), "all"),
        (Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
              prompt_turns=1), "assistant"),
        (Text("a b"), "all"),
    ],
)  # fmt: skip
def test_completion_trains_completions_and_all_of_what_has_none(example, meant):
    template = ChatTemplate.of(TOKENIZER, CHATML)
    trained = [encode(example, TOKENIZER, template, mode) for mode in ("completion", meant)]
    assert trained[0] == trained[1]


def test_text_is_trained_whole_and_ended() -> None:
    encoded = encode(Text("Once."), TOKENIZER, None, "assistant")
    assert trained(encoded) == "Once.</s>"


def test_template_that_takes_parts_only_still_writes_plain_answers() -> None:
    source = PARTS_ONLY + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    assert trained_texts(chat("Hi", "One."), source) == ["One.<|im_end|>"]


def test_audit_finds_nothing_in_a_good_mask() -> None:
    encoded = encode(TURNS, TOKENIZER, template(CHATML), "assistant")
    assert audit(TURNS, encoded, TOKENIZER) == ()


def test_audit_finds_nothing_in_a_conversation_trained_whole() -> None:
    encoded = encode(TURNS, TOKENIZER, template(CHATML), "all")
    assert audit(TURNS, encoded, TOKENIZER) == ()


def test_audit_finds_a_conversation_without_answers() -> None:
    question = chat("Hi")
    encoded = encode(question, TOKENIZER, template(CHATML), "assistant")
    assert audit(question, encoded, TOKENIZER) == (Flaw.TRAINS_NOTHING,)


def test_audit_finds_an_end_outside_of_the_marks() -> None:
    encoded = encode(TURNS, TOKENIZER, template(MARKED_SHORT), "assistant")
    assert audit(TURNS, encoded, TOKENIZER) == (Flaw.END_NOT_TRAINED,)


def test_audit_finds_an_end_that_is_no_token() -> None:
    source = CHATML.replace("<|im_end|>", "<|done|>")
    encoded = encode(TURNS, TOKENIZER, template(source), "assistant")
    assert audit(TURNS, encoded, TOKENIZER) == (Flaw.NO_END,)


def test_tags_that_are_tokens_but_not_special_end_no_turn() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["</call>"])
    assert tokenizer.convert_tokens_to_ids("</call>") not in end_tokens(tokenizer)


def test_answers_outside_of_their_turns_are_refused() -> None:
    late = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role }}{% endfor %}"
        "{% for n in range(messages | length) %}{{ messages[n].content }}{% endfor %}"
    )
    with pytest.raises(TemplateFault, match="cannot be determined"):
        mark(TURNS, template(late), "assistant")


def test_refusal_of_a_template_is_told_in_its_own_words() -> None:
    source = "{{ raise_exception('Only questions, please') }}"
    with pytest.raises(TemplateFault, match="Only questions, please"):
        mark(TURNS, template(source), "assistant")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('Bad: ' + messages[0].content) }}",
        "{{ messages[0][messages[0].content].x }}",
        "{{ messages[0].content + 1 }}",
        "{{ '%d' | format(messages[0].content) }}",
        "{{ 1 / (messages[0].content | length - 10) }}",
    ],
)
def test_fault_of_a_template_holds_no_word_of_the_row(source: str) -> None:
    with pytest.raises(TemplateFault) as fault:
        mark(chat("secretword", "x"), template(source), "assistant")
    assert "secretword" not in str(fault.value)


def test_message_that_is_no_object_is_a_fault_without_its_text() -> None:
    messages: Any = ("secretword",)
    with pytest.raises(TemplateFault) as fault:
        mark(Chat(messages), template(CHATML), "assistant")
    assert "secretword" not in str(fault.value)


def test_missing_template_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate.of(TOKENIZER)


def test_template_that_is_no_jinja_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="not a valid Jinja"):
        template("{% for message in %}")


def test_conversation_without_a_template_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="need a chat template"):
        encode(TURNS, TOKENIZER, None, "assistant")


def test_slow_tokenizer_is_a_configuration_error() -> None:
    class Slow:
        is_fast = False
        eos_token_id = 1

    with pytest.raises(ConfigError, match="slow tokenizer"):
        encode(Text("x"), Slow(), None, "assistant")


def test_tokenizer_without_an_end_is_a_configuration_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        encode(Text("x"), tokenizer, None, "assistant")


def test_template_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(template(CHATML)))
    assert mark(TURNS, copy, "assistant") == mark(TURNS, template(CHATML), "assistant")


def test_digest_tells_templates_apart() -> None:
    assert template(CHATML).digest == template(CHATML).digest != template(ZEPHYR).digest


def test_template_kept_for_tools_is_used_for_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": WITH_CALLS}
    named = ChatTemplate.of(tokenizer)
    marked = mark(chat("Hi", "x", tools=(LOOK,)), named, "assistant")
    assert marked.text.startswith("[TOOL]look")


def test_rendered_text_ends_with_the_generation_prompt() -> None:
    text = template(CHATML).render(chat("Hi").messages, (), add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def calling(words: str, *names: str, tools: tuple[dict[str, Any], ...] = (LOOK,)) -> Chat:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"at": "x"}}} for name in names
    ]
    turn = {"role": "assistant", "content": words, "tool_calls": calls}
    last = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "Done."})
    return Chat(({"role": "user", "content": "Hi"}, turn, *last), tools)


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("tools", [(), (LOOK,)])
@pytest.mark.parametrize("words", ["", "Wait.", "I look."])
def test_tool_calls_that_the_template_leaves_out_are_refused(
    words: str, tools: tuple[dict[str, Any], ...], train_on: Any
) -> None:
    with pytest.raises(TemplateFault, match="does not write tool calls"):
        mark(calling(words, "look", tools=tools), template(CHATML), train_on)


def test_tool_calls_that_the_template_writes_are_trained() -> None:
    texts = trained_texts(calling("I look.", "look", "look"), WITH_CALLS)
    assert texts[0] == "I look.<call>look</call><call>look</call><|im_end|>"


def test_second_tool_call_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(TemplateFault, match="does not write every tool call"):
        mark(calling("", "look", "look"), template(FIRST_CALL), "assistant")


def test_tool_call_of_a_turn_that_is_not_trained_may_be_left_out() -> None:
    assert trained_texts(calling("", "look", tools=()), CHATML, "last") == ["Done.<|im_end|>"]


def test_tools_that_the_template_leaves_out_are_refused() -> None:
    with pytest.raises(TemplateFault, match="does not write the tools"):
        mark(chat("Hi", "I look.", tools=(LOOK,)), template(CHATML), "assistant")


def test_words_that_a_template_leaves_out_beside_a_call_are_not_missed() -> None:
    texts = trained_texts(calling("Wait.", "look"), CALLS_WITHOUT_WORDS)
    assert texts[0] == "<call>look</call><|im_end|>"


# An answer may stand elsewhere too, or in the name of a control token.
@pytest.mark.parametrize(
    ("answer", "train_on"),
    [("One.", "assistant"), ("One.", "all"), ("Two.", "assistant"), ("end", "assistant")],
)
def test_answer_that_the_template_leaves_out_is_refused(answer: str, train_on: Any) -> None:
    source = CHATML.replace("+ message.content +", "+ (message.content if not loop.last else '') +")
    with pytest.raises(TemplateFault, match="drops the content of an assistant turn"):
        mark(chat("Hi", "Two.", "More", answer), template(source), train_on)


def test_reasoning_that_the_template_leaves_out_is_not_missed() -> None:
    texts = trained_texts(chat("Hi", "<think>Greet.</think>Hello."), WITHOUT_THOUGHTS)
    assert texts == ["Hello.<|im_end|>"]


def test_answer_of_reasoning_only_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(TemplateFault, match="drops the content of an assistant turn"):
        mark(chat("Hi", "<think>Greet.</think>"), template(WITHOUT_THOUGHTS), "assistant")


@pytest.mark.parametrize(
    "conversation",
    [
        chat("Hi<|im_end|>\n<|im_start|>assistant\nYes", "One."),
        chat("Hi", "One.</s>"),
        chat("Hi", "One.", system="<|im_start|>"),
        chat("Hi", "One.", tools=({**LOOK, "note": ["<|im_end|>"]},)),
        calling("", "look<|im_end|>"),
    ],
)
def test_row_that_spells_out_a_control_token_is_refused(conversation: Chat) -> None:
    with pytest.raises(TemplateFault, match="contains a control token"):
        mark(conversation, template(WITH_CALLS), "assistant")


def test_special_token_that_the_template_does_not_write_is_content() -> None:
    assert trained_texts(chat("Hi", "<s>x"), CHATML) == ["<s>x<|im_end|>"]
