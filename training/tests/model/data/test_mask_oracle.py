"""The mask from a plain template against the one that TRL's authors marked by hand.

TRL ships the chat templates of many model families in pairs: `X.jinja` as the model
has it, `X_training.jinja` with `{% generation %}` around what the assistant generates.
Both are read from the installed package. Ours is found from the plain one alone.

Two rules of TRL's differ from ours, and are taken out of its marks before comparing,
by the exact strings of the tables below: some of its templates train the separator
behind the token that ends a turn, and some train words that the generation prompt
has already written. Every other difference is a failure, unless it is listed; a list
entry that no longer differs is a failure too.
"""

from __future__ import annotations

import re

import pytest

from lora_trainer.data.examples import Chat
from lora_trainer.data.mask import Flaw, audit, mark
from lora_trainer.data.template import ChatTemplate, Span, TemplateFault
from support.template_pairs import (
    CONVERSATIONS,
    FAMILIES,
    PROMPTED,
    SEPARATORS,
    TEMPLATES,
    compare,
    encoded,
    template,
    tokenizer,
)

MARKED = sorted(
    p.stem
    for p in TEMPLATES.glob("*.jinja")
    if re.search(r"\{%-? *generation", p.read_text("utf-8"))
)

pytestmark = [
    pytest.mark.any_stack,  # the oldest stack's TRL has no pairs of templates
    pytest.mark.skipif(not FAMILIES, reason="this TRL ships no pairs of templates"),
]
TOOL_RESULTS = {"tool result", "two tool calls", "tool turns", "thinking tool result"}
TOOLS = TOOL_RESULTS | {"tool call"}
OPENED = {"opened by assistant"}
HISTORY = {
    "turns", "multi-line", "padded", "empty", "empty last", "repeated",
    "opened by assistant", "thinking turns", "tool turns",
}  # fmt: skip

# Conversations that the plain template itself refuses.
REFUSED_BY_TEMPLATE: dict[str, set[str]] = {
    "cohere": TOOL_RESULTS | OPENED,  # roles must alternate
    "cohere2": TOOL_RESULTS | OPENED,  # roles must alternate
    "deepseekv3": TOOLS,  # takes tool arguments as text only; TRL's takes both
    "gemma": TOOL_RESULTS | OPENED | {"system"},  # roles must alternate, none but these two
    "gemma3": TOOL_RESULTS | OPENED,  # roles must alternate
    "llava_next": TOOL_RESULTS,  # user and assistant only
}
# Templates that leave tool calls out of the text: we refuse, TRL trains an empty turn.
# (DeepSeek's writes calls only where the content is null.)
TOOLLESS = (
    *("cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2"),
    *("llama3", "llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
)
REFUSED: dict[str, set[str]] = {
    family: REFUSED_BY_TEMPLATE.get(family, set()) | (TOOLS if family in TOOLLESS else set())
    for family in {*REFUSED_BY_TEMPLATE, *TOOLLESS}
}
# Writes the first call of a turn only, in TRL's version too; the others would be lost.
REFUSED["gptoss"] = {"two tool calls"}
# Conversations that TRL's training template writes as another text.
REWRITTEN: dict[str, set[str]] = {
    # TRL keeps the reasoning in the answer, which the plain one cuts away.
    "deepseek_r1_distill": {"inline thinking"},
    # TRL appends the token by which the model stops; the plain one ends without any.
    "glm4moe": set(CONVERSATIONS),
    # TRL writes a reasoning block into every turn, the plain ones only behind the last question.
    "qwen3": HISTORY | {"tool result", "two tool calls"},
    "qwen3_5_nothink": HISTORY,
    "qwen3_5_think": HISTORY,
    "qwen3_6": HISTORY,
}
# Of the rewritten, those in which even the last turn is another text.
REWRITTEN_LAST: dict[str, set[str]] = {"deepseek_r1_distill": {"inline thinking"}}
# Differences between the masks of one and the same text.
DIFFERENT: dict[str, set[str]] = {
    # A call awaiting its result ends in <|tool_response>, by which the model hands over:
    # the turn would have no trained end without it. TRL leaves it out.
    "diffusion_gemma": {"tool call"},
}
# Plain templates that write a turn without a token that ends it: the audit's finding.
ENDLESS: dict[str, set[str]] = {
    "glm4moe": set(CONVERSATIONS),
    # Words beside a tool call are written behind the call's result, without an end.
    "diffusion_gemma": {"tool turns"},
}


CASES = [(family, conversation) for family in FAMILIES for conversation in CONVERSATIONS]


def is_listed(table: dict[str, set[str]], family: str, conversation: str) -> bool:
    return conversation in table.get(family, ())


@pytest.mark.parametrize(("family", "conversation"), CASES)
def test_characters_trained_are_those_that_trl_marks(family: str, conversation: str) -> None:
    pair = compare(family, conversation)
    assert (pair is None) == is_listed(REFUSED, family, conversation)
    if pair is None:
        return
    is_rewritten = pair.ours.text != pair.marked.text
    assert is_rewritten == is_listed(REWRITTEN, family, conversation)
    ours, theirs = pair.texts()
    if is_rewritten:
        is_other_last = is_listed(REWRITTEN_LAST, family, conversation)
        assert (ours[-1] != theirs[-1]) == is_other_last
        assert len(ours) == len(theirs)
    else:
        is_different = pair.ours.spans != pair.reduced
        assert is_different == is_listed(DIFFERENT, family, conversation), (ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_trained_are_those_that_transformers_masks(family: str) -> None:
    for conversation, chat in CONVERSATIONS.items():
        pair = compare(family, conversation)
        if pair is None or pair.ours.text != pair.marked.text:
            continue
        example = encoded(family, conversation)
        ids, mask, offsets = masked_by_transformers(chat, template(f"{family}_training"))
        assert example.input_ids == ids, conversation
        if is_listed(DIFFERENT, family, conversation):
            continue
        kept = [any(a < end and start < b for a, b in pair.reduced) for start, end in offsets]
        assert example.loss_mask == [m and k for m, k in zip(mask, kept, strict=True)], conversation


@pytest.mark.parametrize("name", MARKED)
def test_marks_of_a_template_are_taken_as_transformers_takes_them(name: str) -> None:
    seen = 0
    for conversation, chat in CONVERSATIONS.items():
        try:
            example = encoded(name, conversation)
        except TemplateFault:
            continue
        ids, mask, _ = masked_by_transformers(chat, template(name))
        assert (example.input_ids, example.loss_mask) == (ids, mask), conversation
        seen += 1
    assert seen


def masked_by_transformers(
    chat: Chat, marked: ChatTemplate
) -> tuple[list[int], list[bool], list[Span]]:
    messages = list(chat.messages)
    if marked.takes_typed_content:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    encoding = tokenizer().apply_chat_template(
        messages,
        tools=list(chat.tools) or None,
        chat_template=marked.text,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    mask = [bool(value) for value in encoding["assistant_masks"]]
    return encoding["input_ids"], mask, encoding["offset_mapping"]


@pytest.mark.parametrize("family", TOOLLESS)
def test_a_template_without_tools_is_refused_by_that_reason(family: str) -> None:
    with pytest.raises(TemplateFault, match="does not write tool calls"):
        mark(CONVERSATIONS["tool call"], template(family), "assistant")


@pytest.mark.parametrize("family", sorted(PROMPTED.keys() | SEPARATORS.keys()))
def test_every_listed_rule_of_trl_still_applies(family: str) -> None:
    pairs = [pair for c in CONVERSATIONS if (pair := compare(family, c))]
    used = frozenset().union(*(pair.rules for pair in pairs))
    assert used == {*PROMPTED.get(family, ()), *SEPARATORS.get(family, ())}


@pytest.mark.parametrize("family", sorted(PROMPTED))
def test_what_trl_trains_too_early_stands_in_the_generation_prompt(family: str) -> None:
    chat = CONVERSATIONS["single"]
    prompt = template(family).render(chat.messages[:-1], chat.tools, True)[-60:]
    assert all(words in prompt for words in PROMPTED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_audit_finds_fault_with_endless_templates_only(family: str) -> None:
    for conversation, chat in CONVERSATIONS.items():
        if is_listed(REFUSED, family, conversation):
            continue
        flaws = audit(chat, encoded(family, conversation), tokenizer())
        assert bool(flaws) == is_listed(ENDLESS, family, conversation), conversation
        assert set(flaws) <= {Flaw.NO_END}


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_text_is_the_text_of_the_tokenizer(family: str) -> None:
    for conversation in ("turns", "thinking turns", "tool turns"):
        if is_listed(REFUSED, family, conversation):
            continue
        chat = CONVERSATIONS[conversation]
        messages, tools = template(family).normalize(chat.messages, chat.tools)
        traced = template(family).trace(messages, tools, True).text
        assert traced == template(family).render(chat.messages, chat.tools, True), conversation


def test_tables_name_only_families_and_conversations_that_exist() -> None:
    for table in (REFUSED, REWRITTEN, REWRITTEN_LAST, DIFFERENT, ENDLESS):
        assert table.keys() <= set(FAMILIES)
        assert all(names <= CONVERSATIONS.keys() for names in table.values())
    assert len(FAMILIES) > 12
