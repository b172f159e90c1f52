"""One definition of how a model is asked and where its answers end, in everything exported."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_trainer import cli
from lora_trainer.data.prompt_format import PromptFormat, format_of_rows, read_format
from lora_trainer.run.events import Generated, Warned
from lora_trainer.train.export import save_prompt_format
from support.trained_run import CHAT, CHATML, COMPLETION, SPECIAL_START, TEXT, train_run, write_base

ENDOFTEXT, IM_START, IM_END = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return AutoTokenizer.from_pretrained(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    root = tmp_path_factory.mktemp("chat")
    return train_run(root, CHAT, f"--chat_template={CHATML}")


def row(*trained: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([i for i, _ in trained]), np.array([mark for _, mark in trained])


ANSWER = row((IM_START, False), (50, True), (IM_END, True), (51, False), (52, True), (IM_END, True))


def test_ends_are_the_special_tokens_that_end_trained_parts(tokenizer) -> None:
    prompt_format = format_of_rows([ANSWER], ["messages"], tokenizer)
    assert prompt_format == PromptFormat("chat", (IM_END,))


def test_a_row_cut_in_the_middle_adds_no_end(tokenizer) -> None:
    cut = row((50, False), (51, True), (IM_START, True))
    prompt_format = format_of_rows([ANSWER] * 99 + [cut], ["messages"], tokenizer)
    assert prompt_format.end_token_ids == (IM_END,)


def test_white_space_behind_the_end_is_not_the_end(tokenizer) -> None:
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    prompt_format = format_of_rows(
        [row((50, True), (IM_END, True), (newline, True))], ["text"], tokenizer
    )
    assert prompt_format.end_token_ids == (IM_END,)


def test_rows_without_an_end_leave_the_tokenizers_own(tokenizer) -> None:
    prompt_format = format_of_rows([row((50, True), (51, True))], ["completion"], tokenizer)
    assert prompt_format == PromptFormat("completion", (ENDOFTEXT,))


def test_a_foreign_adapter_ends_where_its_chat_template_does(tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    try:
        assert read_format(tmp_path, tokenizer) == PromptFormat("chat", (IM_END,))
    finally:
        tokenizer.chat_template = None
    assert read_format(None, tokenizer) == PromptFormat("text", (ENDOFTEXT,))


def test_the_end_of_the_template_is_the_end_in_every_artefact(chat_run) -> None:
    run, events = chat_run
    final = run / "final_model"
    generation = json.loads((final / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [IM_END, ENDOFTEXT]
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "| Answers end with | `<\\|im_end\\|>` |" in (final / "README.md").read_text()
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert any("end with <|im_end|>, which is not an end token" in one for one in warned)


def test_check_reports_the_end_of_the_answers(chat_run, capsys: pytest.CaptureFixture[str]) -> None:
    root = chat_run[0].parent
    (root / "config.json").write_text("{}")  # without the shipped one's held-out rows
    keys = [f"--config={root / 'config.json'}", f"--model_name_or_path={root / 'model'}"]
    keys += [f"--dataset={root / 'rows.jsonl'}"]
    keys += [f"--dataset_cache_dir={root / 'cache'}", f"--output_dir={root / 'checked'}"]
    assert cli.main(["check", *keys, f"--chat_template={CHATML}"]) == 0
    shown = capsys.readouterr().out
    assert "answers      end with <|im_end|> (chat rows)" in shown
    assert "not an end token of the base model (<|endoftext|>)" in shown


def test_merged_model_stops_by_its_own_defaults(chat_run, tmp_path: Path) -> None:
    run, _ = chat_run
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = tokenizer.apply_chat_template(
        CHAT["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = asked["input_ids"]
    generated = model.generate(
        input_ids=ids, attention_mask=asked["attention_mask"], max_new_tokens=40, do_sample=False
    )
    assert tokenizer.decode(generated[0, ids.shape[1] :]) == "pong<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"


def test_adapter_taken_from_a_checkpoint_ends_its_answers_alike(chat_run, tmp_path: Path) -> None:
    run, _ = chat_run
    checkpoint = next((run / "checkpoints").iterdir())
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    for name, key in (("generation_config.json", "eos_token_id"), ("prompt_format.json", "kind")):
        ours, final = tmp_path / "out" / name, run / "final_model" / name
        assert json.loads(ours.read_text())[key] == json.loads(final.read_text())[key]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


def run_example(folder: Path, prompt: str) -> str:
    """Run the code of a model card in its folder, the prompt put in; return what it prints."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"..."', repr(prompt)).replace('adapter = "."', f'adapter = "{folder}"')
    code = code.replace("max_new_tokens=128", "max_new_tokens=40, do_sample=False")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.mark.parametrize(
    ("row", "keys", "prompt", "answer"),
    [
        (CHAT, (f"--chat_template={CHATML}",), "ping", "pong"),
        (COMPLETION, (), "Colour of alpha:", " red"),
        (TEXT, (), "Once there", " was an end."),
    ],
    ids=["chat", "completion", "text"],
)
def test_example_of_the_card_and_chat_ask_as_training_did(
    row: dict,
    keys: tuple[str, ...],
    prompt: str,
    answer: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = train_run(tmp_path, row, *keys)
    assert run_example(run / "final_model", prompt) == answer + "\n"
    capsys.readouterr()
    assert cli.main(["chat", str(run), "--prompt", prompt, "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == answer + "\n"


def test_completion_model_of_a_base_with_a_template_is_asked_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = train_run(tmp_path, COMPLETION)
    settings = run / "final_model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHATML}))
    capsys.readouterr()
    assert cli.main(["chat", str(run), "--prompt", "Colour of alpha:"]) == 0
    assert capsys.readouterr().out == " red\n"


def test_answers_that_begin_with_special_tokens_are_answers_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (f"--chat_template={SPECIAL_START}", "--eval_generate=true", "--eval_fraction=0")
    run, events = train_run(
        tmp_path, CHAT, *keys, f"--eval_dataset={_held_out(tmp_path)}", steps=80
    )
    generated = [event for event in events if isinstance(event, Generated)]
    assert generated[-1].exact_match == 1.0
    capsys.readouterr()
    assert cli.main(["chat", str(run), "--prompt", "ping", "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == "final\npong\n"


def _held_out(root: Path) -> Path:
    path = root / "held-out.jsonl"
    turns = [{"role": "system", "content": ""}, *CHAT["messages"]]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


def test_an_unset_or_damaged_record_is_no_fault(tokenizer, tmp_path: Path) -> None:
    for content in ("{", "[]", '{"kind": "verse", "end_token_ids": [1]}', '{"kind": "chat"}'):
        (tmp_path / "prompt_format.json").write_text(content)
        assert read_format(tmp_path, tokenizer).kind == "text"


def test_training_ends_stop_generation_before_the_bases_own(tokenizer) -> None:
    class Generation:
        eos_token_id = (IM_START,)

    generation = Generation()
    generation.eos_token_id = [IM_START, ENDOFTEXT]
    assert PromptFormat("chat", (IM_END,)).stops(tokenizer, generation) == [2, 1, 0]
    assert PromptFormat("chat", ()).stops(tokenizer, None) == [ENDOFTEXT]


def test_base_end_of_the_tokenizer_alone_stays_an_end(tmp_path: Path) -> None:
    base = AutoTokenizer.from_pretrained(write_base(tmp_path))
    base.chat_template = CHATML
    save_prompt_format(tmp_path, PromptFormat("chat", (IM_END,)), base, None)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [IM_END, ENDOFTEXT]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
