"""Talking with a trained model, typed and piped."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lora_trainer
from lora_trainer import cli
from lora_trainer.commands import chat
from lora_trainer.commands.finetuned import config_of_run, find, open_model
from lora_trainer.data.prompt_format import PromptFormat
from support.run_folders import adapted, make_run, shake


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


def expected(run: Path, text: str, *, is_base: bool = False) -> str:
    """Return the answer that plain transformers and PEFT make."""
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    model = adapted(run.parent / "model", config_of_run(run))
    if not is_base:
        shake(model)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    # transformers 4.50 adds what this model has no use for.
    inputs.pop("token_type_ids", None)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=[0, 1, 2])
    text = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join(map(chat._harmless, text))


@pytest.mark.parametrize("is_base", [False, True])
def test_one_prompt_is_answered_as_plain_peft_does(
    run: Path, is_base: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base"] if is_base else []
    asked = ["--prompt", "What follows 7?", "--max-new-tokens", "12", *flags]
    assert cli.main(["chat", str(run), *asked]) == 0
    assert capsys.readouterr().out == expected(run, "What follows 7?", is_base=is_base) + "\n"


def test_a_few_rows_of_a_dataset_are_answered_beside_their_own_answers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "d.csv"
    table.write_text("Question,Answer\n" + "".join(f"q{n},a{n}\n" for n in range(9)))
    columns = '{"instruction": "Question", "output": "Answer"}'
    asked = ["--dataset", str(table), "--dataset_columns", columns, "--max-new-tokens", "4"]
    assert cli.main(["chat", str(run), *asked, "--rows", "3"]) == 0
    printed = capsys.readouterr()
    shown = [line.split(maxsplit=1)[1] for line in printed.out.splitlines() if "ed " in line]
    assert shown == ["a0", "a3", "a6"]
    assert printed.out.count("prompt    q") == 3
    assert "3 of 9 rows, spread evenly; --rows 0 answers all" in printed.err
    assert "answering: 3 prompts" in printed.err
    assert cli.main(["chat", str(run), *asked, "--system", "Be brief."]) == 78


def test_piped_text_is_answered_once(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What follows 7?\n")))
    assert cli.main(["chat", str(run), "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == expected(run, "What follows 7?") + "\n"


def test_empty_input_and_wrong_numbers_are_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    assert cli.main(["chat", str(run)]) == 78
    for wrong in ("--max-new-tokens=0", "--temperature=-1", "--top-p=0", "--temperature=nan"):
        assert cli.main(["chat", str(run), "--prompt", "x", wrong]) == 78
    assert "there is no prompt" in capsys.readouterr().err


def test_conversation_remembers_its_turns_until_it_is_reset(run: Path) -> None:
    talked = chat.Conversation(
        open_model(find(str(run))), chat.Asking(max_new_tokens=4), is_base=False, system="Be brief."
    )
    first = talked.answer("one", lambda _: None)
    prompt = talked._prompt("two")
    for part in ("Be brief.", "one", first, "two"):
        assert part in prompt
    assert chat._obey(talked, "/reset")
    assert chat._obey(talked, "/system")
    assert "one" not in talked._prompt("two")
    assert "Be brief." not in talked._prompt("two")
    assert not chat._obey(talked, "/quit")


def test_interrupted_answer_keeps_the_words_that_were_shown(run: Path) -> None:
    talked = chat.Conversation(
        open_model(find(str(run))), chat.Asking(max_new_tokens=64), is_base=False, system=None
    )
    shown = []

    def stop(piece: str) -> None:
        shown.append(piece)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talked.answer("a b c", stop)
    assert talked.turns[-1] == {"role": "assistant", "content": "".join(shown)}
    assert not talked.opened.causal.model.training


def test_too_long_conversation_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(run), "--prompt", "long " * 200]) == 78
    assert "longer than the model's context" in capsys.readouterr().err


def test_model_without_a_template_goes_on_with_the_text(run: Path) -> None:
    opened = open_model(find(str(run)))
    opened.prompt_format = PromptFormat("text", (0,))
    talked = chat.Conversation(opened, chat.Asking(max_new_tokens=3), is_base=False, system=None)
    assert talked._prompt("once upon") == "once upon"
    talked.answer("once upon", lambda _: None)


def test_template_that_refuses_is_a_fault_with_a_remedy(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_model(find(str(run)))
    opened.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    talked = chat.Conversation(opened, chat.Asking(), is_base=False, system="x")
    chat._answer_shown(talked, "hello")
    assert "rejects this conversation" in capsys.readouterr().err


def test_answers_cannot_steer_the_terminal() -> None:
    text = "a\x1b[31mb\x07\tc\nd\u202eé"
    assert "".join(map(chat._harmless, text)) == "a\\x1b[31mb\\x07\tc\nd\\u202eé"


def test_temperature_draws_other_answers(run: Path) -> None:
    opened = open_model(find(str(run)))
    answers = set()
    for seed in range(3):
        torch.manual_seed(seed)
        asking = chat.Asking(max_new_tokens=12, temperature=1.5)
        talked = chat.Conversation(opened, asking, is_base=False, system=None)
        answers.add(talked.answer("x", lambda _: None))
    assert len(answers) > 1


def test_terminal_holds_a_conversation_until_control_d(run: Path) -> None:
    master, slave = pty.openpty()
    source = str(Path(lora_trainer.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_trainer", "chat", str(run), "--max-new-tokens", "4"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": source, "TERM": "dumb"},
    )
    os.close(slave)

    screen = b""

    def read_until(words: bytes) -> None:
        nonlocal screen
        until = time.monotonic() + 120
        while words not in screen and time.monotonic() < until:
            if select.select([master], [], [], 1)[0]:
                screen += os.read(master, 4096)
        _, separator, screen = screen.partition(words)
        assert separator

    try:
        read_until(b"> ")
        for typed, seen in (
            (b"/help\n", b"clear the conversation"),
            (b"/base\n", b"without the adapter answers"),
            (b"/nonsense\n", b"unknown command"),
            (b"hello\n", b"\n"),
        ):
            os.write(master, typed)
            read_until(seen)
            read_until(b"> ")
        os.write(master, b"\x04")
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
