"""What `check` shows of the data: which turns are trained, what is changed, what is not used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lora_trainer import cli
from support.tiny_model import write_model

WITHOUT_EARLIER_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("base") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2048  # descriptions of tools, a token a character
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(model: Path, folder: Path, rows: list[dict], *keys: str, name: str = "d.jsonl") -> int:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text("{}")  # without the shipped one's held-out rows
    return cli.main(
        [
            "check",
            "--show-sample",
            f"--config={folder / 'config.json'}",
            f"--model_name_or_path={model}",
            f"--dataset={folder / name}",
            f"--dataset_cache_dir={folder / 'cache'}",
            f"--output_dir={folder / 'out'}",
            *keys,
        ]
    )


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


def test_a_turn_of_weight_zero_is_shown_untrained(model, tmp_path, capsys):
    messages = turns("Capital?", "WRONG", "Again?", "Lima")
    messages[1]["weight"] = 0
    assert check(model, tmp_path, [{"messages": messages, "source": "x"}] * 2) == 0
    shown = capsys.readouterr().out
    assert "WRONG<|im_end|>" in shown
    assert shown.count("[[Lima<|im_end|>]]") == 2
    assert "Trained tokens are in [[ ]]; the rest is the prompt that the model sees." in shown
    assert "not used     'source' (fields of the rows)" in shown


def test_an_instruction_that_is_not_understood_is_named_by_file_and_line(model, tmp_path, capsys):
    good, bad = turns("a", "b"), turns("a", "b")
    bad[1]["train_detail"] = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    assert check(model, tmp_path, [{"messages": good}, {"messages": bad}]) == 65
    shown = capsys.readouterr().err
    assert f"{tmp_path}/d.jsonl:2" in shown
    assert "'train_detail', which looks like a training instruction" in shown


def test_reasoning_that_the_template_drops_is_counted_with_a_remedy(model, tmp_path, capsys):
    thought = "<think>\nFIRST\n</think>\n\nFour."
    rows = [{"messages": turns("a", thought, "b", thought)}] * 2 + [
        {"messages": turns("a", thought)}
    ]
    assert check(model, tmp_path, rows, f"--chat_template={WITHOUT_EARLIER_THOUGHTS}") == 0
    shown = capsys.readouterr().out
    assert "2 of 3 rows: the chat template drops the reasoning of an answer" in shown
    assert "set train_on to last" in shown
    assert (
        check(
            model, tmp_path, rows, f"--chat_template={WITHOUT_EARLIER_THOUGHTS}", "--train_on=last"
        )
        == 0
    )
    assert "leaves out" not in capsys.readouterr().out


def test_an_end_token_that_rows_spell_out_is_reported_and_stands_once(model, tmp_path, capsys):
    assert check(model, tmp_path, [{"text": "Once.<|im_end|>\n"}] * 2) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 rows: the text contains the end token: it is kept once" in shown
    assert shown.count("<|im_end|>\n]]") == 2


LONG = "--max_seq_length=2048"
LOOK = {
    "messages": [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
        {"role": "tool", "content": "here"},
        {"role": "assistant", "content": "Here."},
    ],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
}


def test_a_template_without_tools_is_replaced_by_the_one_that_the_error_names(
    model, tmp_path, capsys
):
    assert check(model, tmp_path, [LOOK] * 2) == 65
    assert "set chat_template to chatml or qwen" in capsys.readouterr().err
    for name in ("chatml", "qwen"):
        assert check(model, tmp_path, [LOOK] * 2, f"--chat_template={name}", LONG) == 0
        shown = capsys.readouterr().out
        assert '[[<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>]]' in shown


def test_a_named_template_whose_markers_are_no_tokens_is_refused(model, tmp_path, capsys):
    assert check(model, tmp_path, [LOOK] * 2, "--chat_template=mistral") == 78
    shown = capsys.readouterr().err
    assert "the chat template mistral does not fit this tokenizer" in shown
    assert "set chat_template to chatml or qwen" in shown


def test_an_unknown_template_name_is_answered_with_those_that_ship(model, tmp_path, capsys):
    assert check(model, tmp_path, [LOOK] * 2, "--chat_template=vicuna") == 78
    assert "set it to chatml, llama3, mistral, qwen or a Jinja file" in capsys.readouterr().err


def test_a_system_prompt_that_the_template_adds_is_quoted(model, tmp_path, capsys):
    own = "{{ '<|im_start|>system\nYou are a kind old library clerk.<|im_end|>\n' }}"
    template = f"{own}{WITHOUT_EARLIER_THOUGHTS}"
    rows = [{"messages": turns("a", "b")}] * 3
    assert check(model, tmp_path, rows, f"--chat_template={template}") == 0
    shown = capsys.readouterr().out
    assert (
        "the chat template adds a system prompt of its own, in 3 rows: "
        "'You are a kind old library clerk.'; a system message in a row replaces it"
    ) in shown


def test_the_flag_that_an_unknown_csv_is_answered_with_trains_it(model, tmp_path, capsys):
    (tmp_path / "d.csv").write_text("Question,Answer\nCapital?,Lima\nRiver?,Nile\n")
    (tmp_path / "config.json").write_text("{}")
    keys = [
        f"--model_name_or_path={model}",
        f"--config={tmp_path / 'config.json'}",
        f"--dataset={tmp_path / 'd.csv'}",
        f"--dataset_cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert cli.main(["check", *keys]) == 65
    remedy = next(line for line in capsys.readouterr().err.splitlines() if "remedy:" in line)
    flag = shlex.split(remedy)[-2:]
    assert cli.main(["check", "--show-sample", *keys, *flag]) == 0
    assert "[[Nile<|im_end|>]]" in capsys.readouterr().out
