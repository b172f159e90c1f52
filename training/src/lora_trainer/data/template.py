"""Chat templates: render a conversation and record which message wrote which part.

A template is a Jinja program that comes with the model. It is rendered in the same environment that
transformers uses, so the text equals that of the tokenizer's `apply_chat_template`. For the loss
mask, a second compilation of the same program reports each message that a loop visits; as the
program runs lazily, every piece of text that it then yields belongs to that message.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, UndefinedError
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..config.named_templates import NAMES, fitting
from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Span = tuple[int, int]

# Rendered in place of a chat, this returns messages and tools as transformers passes them to
# templates, including any normalization of this version.
_ECHO = "{{ [messages, tools] | tojson }}"
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "probe7391"
_TRACER = "lora_trainer_trace_"


class TemplateFault(ValueError):  # noqa: N818 - a fault of the row, not ours
    """A template cannot render a conversation, or its mask cannot be found.

    `why` never contains text of the conversation; the caller, which knows file and line, creates
    the `DataError`.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, slots=True)
class Piece:
    """Characters `start` to `end` of a rendered chat, written while message `owner` was current.

    `owner` is None for text outside any message, such as the generation prompt.
    """

    start: int
    end: int
    owner: int | None


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered chat: its pieces in order, and the template's own generation spans."""

    text: str
    pieces: tuple[Piece, ...]
    generation_spans: tuple[Span, ...]

    @property
    def is_traced(self) -> bool:
        """Return whether the template visited any message in a loop."""
        return any(piece.owner is not None for piece in self.pieces)

    def pieces_of(self, owner: int) -> list[Piece]:
        """Return the text written by message `owner`."""
        return [piece for piece in self.pieces if piece.owner == owner]

    def written_by(self, owner: int, spans: Sequence[Span]) -> str:
        """Return the spans written by message `owner`; all if no message was visited."""
        pieces = self.pieces_of(owner) if self.is_traced else self.pieces
        shared = ((max(a, p.start), min(b, p.end)) for p in pieces for a, b in spans)
        return "\0".join(self.text[start:end] for start, end in shared if start < end)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or its replacement; picklable.

    `tools_text` is the template for conversations with tools, which is separate in some tokenizers;
    usually it equals `text`. `takes_parts` means that the template only renders contents given as
    lists of parts, like those of vision models; plain strings are then converted, because they
    would silently vanish. `control_tokens` are the special tokens that separate turns.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: str = field(repr=False)
    tools_text: str = field(repr=False)
    takes_typed_content: bool = False
    control_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, override: str | None = None) -> ChatTemplate:
        """Create it from the tokenizer's template or `override`.

        Raises:
            ConfigError: there is no template, or it is not valid Jinja.
        """
        try:
            text = tokenizer.get_chat_template(override)
            tools_text = tokenizer.get_chat_template(override, tools=[{}])
        except ValueError as error:
            raise ConfigError.of(
                "the tokenizer has no chat template",
                where="chat_template",
                why="the data are conversations, which need a template to become text",
                remedy=f"set chat_template to {' or '.join(_fitting(tokenizer))}, "
                "or use the model's chat version",
            ) from error
        template = cls(tokenizer, text, tools_text)
        try:
            _compile_traced(text)
            _compile_traced(tools_text)
        except TemplateError as error:
            raise ConfigError.of(
                "the chat template is not a valid Jinja template",
                where=f"chat_template, line {getattr(error, 'lineno', '?')}",
                why=str(error),
            ) from error
        template = replace(template, takes_typed_content=template._needs_typed_content())
        return replace(template, control_tokens=template._find_control_tokens())

    @property
    def digest(self) -> str:
        """Return a sha256 that changes with the template's text."""
        return hashlib.sha256(f"{self.text}\0{self.tools_text}".encode()).hexdigest()

    @property
    def has_generation_spans(self) -> bool:
        """Return whether the template marks the assistant's text with generation tags."""
        return bool(_GENERATION_MARK.search(self.text))

    def refuse_control_tokens(self, chat: Sequence[object]) -> None:
        """Reject any text in a row, at any depth, that could forge or end a turn.

        The tokenizer cannot distinguish a token in the row's text from the template's own.

        Raises:
            TemplateFault: a text of the row contains a control token.
        """
        for part in chat:
            if isinstance(part, str):
                if any(token in part for token in self.control_tokens):
                    raise TemplateFault("its content contains a control token of the chat template")
            elif isinstance(part, Mapping):
                self.refuse_control_tokens([*part.keys(), *part.values()])
            elif isinstance(part, list | tuple):
                self.refuse_control_tokens(part)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the conversation as text.

        Raises:
            TemplateFault: the template rejects the conversation.
        """
        source = self.tools_text if tools else self.text
        return self._apply(source, messages, tools, add_generation_prompt)

    def normalize(
        self, messages: Sequence[Message], tools: Sequence[Message] = ()
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return messages and tools as templates see them, for `trace`.

        Raises:
            TemplateFault: a message has a type that templates cannot handle.
        """
        echo = self._apply(_ECHO, messages, tools, add_generation_prompt=False)
        plain_messages, plain_tools = json.loads(echo)
        return plain_messages, plain_tools or []

    def trace(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """Render normalized messages and record which message wrote which part of the text.

        Raises:
            TemplateFault: the template rejects the conversation.
        """
        source = self.tools_text if tools else self.text
        program = _compile_traced(source)
        tracer = _Tracer(messages)
        chunks = [""]  # transformers 4.50 treats an empty list as "not tracking"
        generation_spans: list[Span] = []
        pieces: list[Piece] = []
        position = 0
        environment: Any = program.environment
        # transformers' tracker re-joins `chunks` at every tag, so it is used only if there are
        # tags.
        tracker = (
            environment.activate_tracker(chunks, generation_spans)
            if _GENERATION_MARK.search(source)
            else nullcontext()
        )
        with tracker, _own_faults(source):
            for chunk in program.generate(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **tracer.functions(),
                **self.tokenizer.special_tokens_map,
            ):
                chunks.append(chunk)
                end = position + len(chunk)
                if pieces and pieces[-1].owner == tracer.owner:
                    pieces[-1] = Piece(pieces[-1].start, end, tracer.owner)
                elif chunk:
                    pieces.append(Piece(position, end, tracer.owner))
                position = end
        return Rendering("".join(chunks), tuple(pieces), tuple(generation_spans))

    def _apply(
        self,
        source: str,
        messages: Sequence[Message],
        tools: Sequence[Message],
        add_generation_prompt: bool,
    ) -> str:
        if self.takes_typed_content:
            messages = [_with_typed_content(message) for message in messages]
        with _own_faults(source):
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return text

    def _find_control_tokens(self) -> tuple[str, ...]:
        """Render a plain conversation: it has no tokens of tools, images or reasoning."""
        roles = ("user", "assistant", "user")
        probe = [{"role": role, "content": _PROBE} for role in roles]
        try:
            text = self.trace(*self.normalize(probe), True).text
        except TemplateFault:
            text = ""
        text += self.tokenizer.eos_token or ""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        # A default system prompt may contain reasoning tags; answers may contain them, too.
        tokens = [t for t in special if len(t) > 2 and t in text and "think" not in t.lower()]
        return tuple(sorted(tokens))

    def _needs_typed_content(self) -> bool:
        probe = [{"role": "user", "content": _PROBE}]
        messages = [_with_typed_content(message) for message in probe]
        return not self._writes_probe(probe) and self._writes_probe(messages)

    def _writes_probe(self, messages: Sequence[Message]) -> bool:
        try:
            return _PROBE in self.trace(*self.normalize(messages)).text
        except TemplateFault:
            return False


def _fitting(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the templates whose markers a tokenizer has as tokens; all where none fits."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return fitting(added) or list(NAMES)


def _with_typed_content(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


class _Tracer:
    """Follows the loops of a running template; its methods are called by the template."""

    def __init__(self, messages: Sequence[object]) -> None:
        self.owner: int | None = None
        self._numbers = {id(message): number for number, message in enumerate(messages)}
        self._outer: list[int | None] = []
        self._has_message: list[bool] = []

    def functions(self) -> dict[str, Any]:
        methods = (self.enter, self.take, self.note, self.leave)
        return {_TRACER + method.__name__: method for method in methods}

    def enter(self) -> None:
        self._outer.append(self.owner)
        self._has_message.append(False)

    def take(self, item: object = None) -> None:
        # Loops over parts or tool calls stay within the current message.
        self.owner = self._outer[-1]
        self._has_message[-1] = False
        self.note(item)

    def note(self, item: object) -> None:
        # Loops over positions select the message inside: `set message = messages[i]`.
        number = self._numbers.get(id(item))
        if number is not None and self._has_message and not self._has_message[-1]:
            self.owner = number
            self._has_message[-1] = True

    def leave(self) -> None:
        self.owner = self._outer.pop()
        self._has_message.pop()


class _LoopReporter(NodeTransformer):
    """Makes each loop of a template report to the tracer; does not change the output."""

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802 - jinja's naming
        self.generic_visit(node)
        node.body.insert(0, _call("take", _names(node.target), node.lineno))
        return [_call("enter", [], node.lineno), node, _call("leave", [], node.lineno)]

    def visit_Assign(self, node: nodes.Assign) -> list[nodes.Node]:  # noqa: N802
        names = _names(node.target)
        return [node, _call("note", names, node.lineno)] if names else [node]


def _names(target: nodes.Node) -> list[nodes.Expr]:
    return [nodes.Name(target.name, "load")] if isinstance(target, nodes.Name) else []


def _call(method: str, arguments: Sequence[nodes.Expr], line: int) -> nodes.ExprStmt:
    function = nodes.Name(_TRACER + method, "load")
    call = nodes.Call(function, list(arguments), [], None, None, lineno=line)
    return nodes.ExprStmt(call, lineno=line)


@lru_cache
def _compile_traced(source: str) -> Template:
    # The environment of any template will do; this one is compiled anyway.
    environment = _compile_jinja_template(_ECHO).environment
    program = _LoopReporter().visit(environment.parse(source))
    template: Template = environment.from_string(program.set_environment(environment))
    return template


@contextmanager
def _own_faults(source: str) -> Iterator[None]:
    """Turn any exception of a template into a TemplateFault without text of the data."""
    try:
        yield
    except Exception as error:
        # A template is code of the model's author and may fail in any way.
        raise TemplateFault(_explain(error, source)) from None


def _explain(error: Exception, source: str) -> str:
    # A template may put row text into its message: only words from its source are repeated.
    message = str(error).strip()
    if isinstance(error, UndefinedError):
        names = [name for name in re.findall(r"'([\w ]+)'", message) if name in source]
        return f"the template needs {names[-1]!r}" if names else "the template needs a field"
    if isinstance(error, TemplateError) and message and message in source:
        return f"the template rejects the conversation: {message}"
    return f"the template cannot render the conversation ({type(error).__name__})"
