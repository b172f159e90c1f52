"""Talk with a trained model: `lora-trainer chat RUN`.

At a terminal a conversation, each answer shown as it is made; Ctrl-C ends an answer,
Ctrl-D or /quit the conversation. With --prompt, or text on standard input, one answer; with
--dataset, the answers to a few of its rows beside those that the rows hold.
"""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import typer

from ..errors import ConfigError
from ..model import sizes
from ..report.progress import Meter
from .finetuned import FinetunedModel, LoadedModel, open_model
from .given_rows import GivenRows, open_rows, spread

HELP = """\
  /base      answer with the base model alone; /adapter: with the adapter again
  /system X  set the system message; alone: none
  /reset     clear the conversation
  /quit      end (Ctrl-D too); Ctrl-C stops the current answer"""
# Marks that turn the direction of writing, and so can show another text than there is.
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
COMMANDS = ("/adapter", "/base", "/help", "/quit", "/exit", "/reset", "/system")


@dataclass(frozen=True, slots=True)
class Asking:
    """How answers are made; a temperature of 0 takes the likeliest token each time."""

    system: str | None = None
    is_base: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        bounds = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 to 100"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "over 0, at most 1"),
        )
        for name, value, is_right, limits in bounds:
            if not is_right:
                raise ConfigError.of(
                    f"{name} cannot be {value}", "command line", f"it must be {limits}"
                )


@dataclass
class Conversation:
    """The turns so far, and which model answers."""

    opened: LoadedModel
    asking: Asking
    is_base: bool
    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, print_piece: Callable[[str], None]) -> str:
        """Answer a user's turn, each piece shown as it comes, and keep both turns.

        A turn whose answer is interrupted before its first word is forgotten.
        """
        prompt = self._prompt(text)
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            print_piece(piece)

        try:
            _generate(self.opened, prompt, self.asking, take, is_base=self.is_base)
        finally:
            answered = "".join(pieces)
            if answered:
                self.turns += [_turn("user", text), _turn("assistant", answered)]
        return answered

    def _prompt(self, text: str) -> str:
        """Write the conversation as the chat template does; the text alone where training did."""
        tokenizer = self.opened.tokenizer
        if not self.opened.prompt_format.has_template:
            return text
        system = [_turn("system", self.system)] if self.system else []
        messages = [*system, *self.turns, _turn("user", text)]
        try:
            return str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # the template is the author's code and may fail in any way
            raise ConfigError.of(
                "the model's chat template rejects this conversation",
                where="chat_template",
                why=f"{type(error).__name__}: {error}"[:300],
                remedy="remove the system message (/system), or /reset",
            ) from error


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(finetuned: FinetunedModel, asking: Asking, prompt: str | None) -> None:
    """Answer one prompt (given, or on standard input), or hold a conversation.

    Raises:
        TrainerError: the model cannot be loaded, or there is no prompt.
    """
    is_terminal = prompt is None and sys.stdin.isatty()
    if prompt is None and not is_terminal:
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    if prompt is not None and not prompt.strip():
        raise ConfigError.of(
            "there is no prompt",
            where="standard input" if not is_terminal else "--prompt",
            why="it is empty",
            remedy='lora-trainer chat RUN --prompt "..."',
        )
    typer.echo(f"loading {finetuned.config.model.model_name_or_path} ...", err=True)
    talked = Conversation(open_model(finetuned), asking, asking.is_base, asking.system)
    if prompt is None:
        _converse(talked)
        return
    talked.answer(prompt.rstrip("\n"), _print_piece)
    typer.echo()


def answer_rows(finetuned: FinetunedModel, asking: Asking, given: GivenRows, rows: int) -> None:
    """Answer the prompts of `rows` rows, spread evenly over those given (0: all), and print both.

    Raises:
        TrainerError: the model or the rows cannot be had.
    """
    from ..train import evaluate

    if asking.system is not None or asking.temperature > 0:
        raise ConfigError.of(
            "--system and --temperature do not go with --dataset",
            "command line",
            "rows are answered as they are, by the most likely tokens",
            "leave them out",
        )
    config, held = open_rows(finetuned, given)
    every = evaluate.questions(held)
    asked = spread(every, rows)
    typer.echo(f"loading {finetuned.config.model.model_name_or_path} ...", err=True)
    opened = open_model(finetuned)
    if len(asked) < len(every):
        typer.echo(
            f"{len(asked):,} of {len(every):,} rows, spread evenly; --rows 0 answers all", err=True
        )
    with contextlib.ExitStack() as stack:
        if asking.is_base and opened.has_adapter:
            stack.enter_context(opened.causal.model.disable_adapter())
        meter = stack.enter_context(Meter("answering", len(asked), "prompts"))
        answers = evaluate.answer(
            opened.causal,
            opened.tokenizer,
            asked,
            ends=opened.stops,
            batch_examples=config.training.per_device_eval_batch_size,
            max_new_tokens=asking.max_new_tokens,
            progress=meter.update,
            advance=meter.advance,
        )
    for one in answers or ():
        typer.echo()
        for name, text in (
            ("prompt", one.prompt),
            ("expected", one.expected),
            ("answer", one.answer),
        ):
            typer.echo(f"{name:<9} " + _printable(text.strip()).replace("\n", f"\n{'':10}"))


def _converse(talked: Conversation) -> None:
    """Read turns until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and a history, where Python has it
    typer.echo(f"{_who(talked)} answers; /help lists the commands", err=True)
    if not talked.opened.prompt_format.has_template:
        typer.echo(
            "it continues each text separately, because it was trained without a chat template",
            err=True,
        )
    typer.echo(err=True)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n(end with /quit or Ctrl-D)", err=True)
            continue
        if text.startswith("/") and text.split()[0] in COMMANDS:
            if not _obey(talked, text):
                return
        elif text.startswith("/") and " " not in text:
            typer.echo(f"unknown command; {HELP.strip()}", err=True)
        elif text:
            _answer_shown(talked, text)


def _answer_shown(talked: Conversation, text: str) -> None:
    try:
        talked.answer(text, _print_piece)
        typer.echo("\n")
    except KeyboardInterrupt:
        typer.echo("\n(stopped)\n", err=True)
    except ConfigError as error:
        typer.echo(f"\n{error.block()}\n", err=True)


def _obey(talked: Conversation, text: str) -> bool:
    """Do what a command says; return whether the conversation goes on."""
    command, _, rest = text.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        typer.echo(HELP, err=True)
    elif command == "/reset":
        talked.turns.clear()
        typer.echo("(the conversation is cleared)\n", err=True)
    elif command == "/system":
        talked.system = rest.strip() or None
        typer.echo("(system message set)\n" if talked.system else "(no system message)\n", err=True)
    else:
        talked.is_base = command == "/base"
        typer.echo(f"({_who(talked)} answers)\n", err=True)
    return True


def _who(talked: Conversation) -> str:
    name = talked.opened.source.name
    if not talked.opened.has_adapter:
        return f"{name}, which has no adapter,"
    return (
        f"{name} without the adapter"
        if talked.is_base
        else f"{name} with {talked.opened.finetuned.name}"
    )


def _generate(
    opened: LoadedModel, prompt: str, asking: Asking, take: Callable[[str], None], *, is_base: bool
) -> None:
    """Make an answer, its pieces handed to `take`."""
    import torch
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc,unused-ignore]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            if text:
                take(text)

    causal, tokenizer = opened.causal, opened.tokenizer
    # A template writes its own special tokens.
    has_template = opened.prompt_format.has_template
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not has_template)
    _refuse_long(inputs["input_ids"].shape[1], causal.inner)
    is_plain = is_base and opened.has_adapter
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if asking.temperature > 0:
        sampling = {"do_sample": True, "temperature": asking.temperature, "top_p": asking.top_p}
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(causal.generating())
        stack.enter_context(torch.no_grad())
        if is_plain:
            stack.enter_context(model.disable_adapter())
        model.generate(
            input_ids=inputs["input_ids"].to(causal.device),
            attention_mask=inputs["attention_mask"].to(causal.device),
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=asking.max_new_tokens,
            eos_token_id=opened.stops or None,
            pad_token_id=tokenizer.pad_token_id,
            top_k=None,
            **sampling,
        )


def _refuse_long(tokens: int, model: Any) -> None:
    limit = sizes.positions(model.config)
    if limit and tokens >= limit:
        raise ConfigError.of(
            "the conversation is longer than the model's context",
            where=f"{tokens} tokens",
            why=f"the model has {limit} positions",
            remedy="/reset starts a new one; or write a shorter prompt",
        )


def _print_piece(piece: str) -> None:
    """Print a piece of an answer; nothing in it may steer the terminal."""
    sys.stdout.write(_printable(piece))
    sys.stdout.flush()


def _printable(text: str) -> str:
    return "".join(_harmless(character) for character in text)


def _harmless(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Co") or character in TURNING
    if character in "\n\t" or not is_control:
        return character
    return character.encode("unicode_escape").decode("ascii")
