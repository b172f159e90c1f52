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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_trainer.data.examples import Chat, Encoded
from lora_trainer.data.mask import Flaw, Marked, audit, encode, mark
from lora_trainer.data.template import ChatTemplate, Span, TemplateFault

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(
    p.name.removesuffix("_training.jinja") for p in TEMPLATES.glob("*_training.jinja")
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

BAR = "\uff5c"  # DeepSeek's wide bar

# What TRL trains behind the end of a turn, although the next prompt writes it.
SEPARATORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("diffusion_gemma", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2"),
            *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
            *("phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_5_nothink"),
            *("qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
        ),
        ("\n",),
    ),
    # The model stops by opening the next turn; TRL appends that, the plain template does not.
    "glm4moe": ("<|user|>", "<|observation|>"),
}
# What TRL trains at the start of a turn, although the generation prompt has written it.
PROMPTED: dict[str, tuple[str, ...]] = {
    "deepseek_r1_distill": (f"<{BAR}Assistant{BAR}>",),
    "deepseekv3": (f"<{BAR}Assistant{BAR}>",),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    "nemotron_3_5_lightning": ("<think>\n",),
    "nemotron_3_nano": ("<think>\n",),
    "nemotron_3_super": ("<think>\n",),
    "nemotron_3_ultra": ("<think>\n",),
    "qwen2_5": ("\n",),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "<think>\n"),
    "qwen3_5_think": ("<think>\n",),
    "qwen3_6": ("<think>\n",),
    "qwen3_8": ("<think>\n",),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(text: str, number: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "name": "look", "tool_call_id": number, "content": text}


def call(place: str, number: str = "c1") -> dict[str, Any]:
    function = {"name": "look", "arguments": {"place": place}}
    return {"type": "function", "id": number, "function": function}


PLACE = {"type": "string", "description": "Where to look."}
PARAMETERS = {"type": "object", "properties": {"place": PLACE}, "required": ["place"]}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look at a place.", "parameters": PARAMETERS},
}
CONVERSATIONS = {
    "single": Chat((user("Hi"), assistant("Hello there."))),
    "system": Chat((system("Be brief."), user("Hi"), assistant("Hello."))),
    "turns": Chat(
        (
            user("Hi"),
            assistant("Hello."),
            user("More"),
            assistant("Yes."),
            user("So"),
            assistant("Bye."),
        )
    ),
    "multi-line": Chat(
        (user("a\n\nb"), assistant("one\n\n  two\n\tthree"), user("x"), assistant("```\ncode\n```"))
    ),
    "padded": Chat((user(" Hi \n"), assistant("\n  in \n\n"), user("x"), assistant("<b>tag</b>"))),
    "empty": Chat((user("Hi"), assistant(""), user("x"), assistant("."))),
    "empty last": Chat((user("Hi"), assistant("."), user("x"), assistant(""))),
    "repeated": Chat((user("same"), assistant("same"), user("same"), assistant("same"))),
    "opened by assistant": Chat((assistant("Hello."), user("Hi"), assistant("There."))),
    "thinking": Chat((user("Hi"), assistant("Hello.", reasoning_content="Greet\nback."))),
    "thinking turns": Chat(
        (
            user("Hi"),
            assistant("Hello.", reasoning_content="Greet."),
            user("Why?"),
            assistant("So.", reasoning_content="It is."),
        )
    ),
    "inline thinking": Chat((user("Hi"), assistant("<think>\nGreet.\n</think>\n\nHello."))),
    "tool call": Chat((user("Where?"), assistant("", tool_calls=[call("home")])), (TOOL,)),
    "tool result": Chat(
        (
            user("Where?"),
            assistant("", tool_calls=[call("home")]),
            tool("here"),
            assistant("Found."),
        ),
        (TOOL,),
    ),
    "two tool calls": Chat(
        (
            user("Where?"),
            assistant("", tool_calls=[call("home"), call("barn", "c2")]),
            tool("no"),
            tool("yes", "c2"),
            assistant("In the barn."),
        ),
        (TOOL,),
    ),
    "tool turns": Chat(
        (
            system("Be brief."),
            user("Where?"),
            assistant("Wait.", tool_calls=[call("home")]),
            tool("here"),
            assistant("There."),
            user("And now?"),
            assistant("", tool_calls=[call("barn")]),
            tool("gone"),
            assistant("Lost."),
        ),
        (TOOL,),
    ),
    "thinking tool result": Chat(
        (
            user("Where?"),
            assistant("", reasoning_content="Look.", tool_calls=[call("home")]),
            tool("here"),
            assistant("Found.", reasoning_content="I see."),
        ),
        (TOOL,),
    ),
}
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


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows the families' special tokens as such."""
    sources = [path.read_text("utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))]
    tags = re.compile(
        rf"<\|[\w ]+\|?>|<\w+\|>|<{BAR}[^{BAR}]+{BAR}>|</?s>|<(?:start|end)_of_\w+>"
        r"|\[gMASK\]|<sop>|\[/?INST\]"
    )
    special = sorted(
        {tag for source in sources for tag in tags.findall(source)} | {"<eos>", "<bos>"}
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sources, trainer)
    bpe.add_special_tokens([AddedToken(tag, normalized=False) for tag in special])
    bpe.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", bos_token="<bos>")


@cache
def encoded(family: str, conversation: str) -> Encoded:
    return encode(CONVERSATIONS[conversation], tokenizer(), template(family), "assistant")


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate.of(tokenizer(), (TEMPLATES / f"{name}.jinja").read_text("utf-8"))


@dataclass(frozen=True)
class Pair:
    """Our mask and TRL's, the latter also without what its rules add."""

    ours: Marked
    marked: Marked
    reduced: tuple[Span, ...]
    rules: frozenset[str]

    def texts(self) -> tuple[list[str], list[str]]:
        ours = [self.ours.text[a:b] for a, b in self.ours.spans]
        theirs = [self.marked.text[a:b] for a, b in self.reduced]
        return ours, theirs


@cache
def compare(family: str, conversation: str) -> Pair | None:
    chat = CONVERSATIONS[conversation]
    try:
        ours = mark(chat, template(family), "assistant")
    except TemplateFault:
        return None
    marked = mark(chat, template(f"{family}_training"), "assistant")
    reduced, rules = [], set()
    for start, end in marked.spans:
        span = marked.text[start:end]
        before = next((s for s in PROMPTED.get(family, ()) if span.startswith(s)), "")
        behind = next((s for s in SEPARATORS.get(family, ()) if span.endswith(s)), "")
        reduced.append((start + len(before), end - len(behind)))
        rules |= {before, behind} - {""}
    return Pair(ours, marked, tuple(reduced), frozenset(rules))


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
        found = encoded(family, conversation)
        ids, mask, offsets = masked_by_transformers(chat, template(f"{family}_training"))
        assert found.input_ids == ids, conversation
        if is_listed(DIFFERENT, family, conversation):
            continue
        kept = [any(a < end and start < b for a, b in pair.reduced) for start, end in offsets]
        assert found.loss_mask == [m and k for m, k in zip(mask, kept, strict=True)], conversation


@pytest.mark.parametrize("name", MARKED)
def test_marks_of_a_template_are_taken_as_transformers_takes_them(name: str) -> None:
    seen = 0
    for conversation, chat in CONVERSATIONS.items():
        try:
            found = encoded(name, conversation)
        except TemplateFault:
            continue
        ids, mask, _ = masked_by_transformers(chat, template(name))
        assert (found.input_ids, found.loss_mask) == (ids, mask), conversation
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
        found = audit(chat, encoded(family, conversation), tokenizer())
        assert bool(found) == is_listed(ENDLESS, family, conversation), conversation
        assert set(found) <= {Flaw.NO_END}


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
