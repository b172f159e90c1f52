"""TRL's pairs of templates, and conversations to compare masks on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_trainer.data.examples import Chat, Encoded
from lora_trainer.data.mask import Marked, encode, mark
from lora_trainer.data.template import ChatTemplate, Span, TemplateFault

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(
    p.name.removesuffix("_training.jinja") for p in TEMPLATES.glob("*_training.jinja")
)

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
