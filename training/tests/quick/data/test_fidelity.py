"""What chat templates leave out and add, and special tokens that rows spell out: counted."""

from __future__ import annotations

from typing import Any

import pytest

from lora_trainer.data.bad_rows import Row
from lora_trainer.data.encoder import ChunkSettings, TokenizerEncoder, encode_chunk
from lora_trainer.data.examples import Change, Chat, Completion, Text
from lora_trainer.data.mask import encode, mark
from lora_trainer.data.template import ChatTemplate
from support.byte_tokenizer import make_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("message.content +", "message.content.strip() +")
# Reasoning is kept in the last turn only, in which an empty block stands where there is none.
LAST_THOUGHTS = (
    "{% for message in messages %}{% set words = message.content.split('</think>')[-1].strip() %}"
    "{% set thoughts = message.reasoning_content or "
    "message.content.split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in message.content or message.reasoning_content else '' %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ words + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant of someone.<|im_end|>\n' }}{% endif %}"
) + CHATML
WITHOUT_SYSTEM = CHATML.replace("messages %}", "messages if message.role != 'system' %}")
FIRST_WORD = CHATML.replace("message.content +", "message.content.split('. ')[-1] +")


def chat(*contents: Any, system: str | None = None) -> Chat:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(contents):
        own = content if isinstance(content, dict) else {"content": content}
        messages.append({"role": ("user", "assistant")[number % 2], **own})
    return Chat(tuple(messages))


THOUGHT = "<think>\nFIRST\n</think>\n\nFour."
FIELD = {"content": "Four.", "reasoning_content": "FIRST"}


@pytest.mark.parametrize(
    ("source", "conversation", "expected"),
    [
        (CHATML, chat("Hi", "One.", "More", "Two."), ()),
        (CHATML, chat("Hi", THOUGHT, "More", "Two."), ()),
        (CHATML, chat("Hi", " One.\n", system="s"), ()),
        (CHATML, chat("Hi", FIELD), (Change.THOUGHTS_DROPPED,)),
        (LAST_THOUGHTS, chat("Hi", THOUGHT), ()),
        (LAST_THOUGHTS, chat("Hi", FIELD), ()),
        (LAST_THOUGHTS, chat("Hi", THOUGHT, "More", THOUGHT), (Change.THOUGHTS_DROPPED,)),
        (LAST_THOUGHTS, chat("Hi", FIELD, "More", FIELD), (Change.THOUGHTS_DROPPED,)),
        (LAST_THOUGHTS, chat("Hi", "One."), (Change.THOUGHTS_ADDED,)),
        (LAST_THOUGHTS, chat("Hi", "in"), (Change.THOUGHTS_ADDED,)),
        (LAST_THOUGHTS, chat("Hi", {"content": "in", "reasoning_content": "in"}), ()),
        (CHATML.replace("message.content +", "'final: ' + message.content +"), chat("Hi", "One."),
         (Change.WORDS_ADDED,)),
        (TRIMMED, chat("Hi ", "One.\n"), (Change.SPACE_STRIPPED,)),
        (TRIMMED, chat("Hi ", "One."), ()),
        (FIRST_WORD, chat("Hi", "Well. It is two, and never three."), (Change.WORDS_DROPPED,)),
        (FIRST_WORD, chat("Well. Hi.", "Two."), (Change.QUESTION_CHANGED,)),
        (WITHOUT_SYSTEM, chat("Hi", "One.", system="Be brief."), (Change.SYSTEM_DROPPED,)),
        (OWN_SYSTEM, chat("Hi", "One."), (Change.SYSTEM_ADDED,)),
        (OWN_SYSTEM, chat("Hi", "One.", system="Be brief."), ()),
        ("{{ 'Today is a day of some year. ' }}" + CHATML, chat("Hi", "One.", system="s"),
         (Change.SYSTEM_ADDED,)),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_or_adds_is_found(source, conversation, expected):
    template = ChatTemplate.of(make_tokenizer(), source)
    assert mark(conversation, template, "assistant").changes == expected


def test_reasoning_of_turns_that_are_not_trained_may_be_left_out():
    template = ChatTemplate.of(make_tokenizer(), LAST_THOUGHTS)
    assert mark(chat("Hi", THOUGHT, "More", THOUGHT), template, "last").changes == ()


def test_changes_are_counted_over_the_rows():
    encoder = TokenizerEncoder(make_tokenizer(), LAST_THOUGHTS)
    conversation = chat("Hi", THOUGHT, "More", THOUGHT)
    rows = [Row({"messages": list(conversation.messages)}, f"d:{n}") for n in range(3)]
    rows.append(Row({"messages": list(chat("Hi", THOUGHT).messages)}, "d:4"))
    chunk = encode_chunk(rows, encoder, ChunkSettings("messages", {}, 100, "truncate"))
    assert chunk.changes == {Change.THOUGHTS_DROPPED.value: 3}


SPELLED = "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na</s>"


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("behind", ["", "\n"])
@pytest.mark.parametrize("is_completion", [False, True])
def test_special_tokens_that_a_row_spells_out_stand_once(adds, behind, is_completion):
    tokenizer = make_tokenizer(adds)
    whole = SPELLED + behind
    example = Completion(whole[:-6], whole[-6:]) if is_completion else Text(whole)
    encoded = encode(example, tokenizer, None, "assistant")
    assert tokenizer.decode(encoded.input_ids) == whole
    end = encoded.input_ids.index(tokenizer.eos_token_id)
    assert encoded.loss_mask[end]
    assert (Change.START_SPELLED in encoded.changes) == adds.startswith("<s>")
    assert Change.END_SPELLED in encoded.changes


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_special_tokens_that_a_row_leaves_out_are_added_once(adds):
    tokenizer = make_tokenizer(adds)
    encoded = encode(Text("plain\n"), tokenizer, None, "assistant")
    start = "<s>" if adds.startswith("<s>") else ""
    assert tokenizer.decode(encoded.input_ids) == f"{start}plain\n</s>"
    assert encoded.loss_mask[-1]
    assert encoded.changes == ()


def test_a_marker_of_another_models_template_is_found():
    encoded = encode(Text("<|start_header_id|>user<|im_end|>"), make_tokenizer(), None, "assistant")
    assert Change.MARKER_UNKNOWN in encoded.changes
    encoded = encode(Text("<|im_start|>user<|im_end|>"), make_tokenizer(), None, "assistant")
    assert encoded.changes == ()
