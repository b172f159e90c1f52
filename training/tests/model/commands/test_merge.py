"""Merged models answer as base model and adapter do, or are not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_trainer import cli
from lora_trainer.commands import merge, new_folder
from lora_trainer.commands.finetuned import config_of_run
from lora_trainer.model.compat import dtype_argument
from lora_trainer.units import size
from support.run_folders import adapted, logits_of, make_run, shake


def of_disk(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, **dtype_argument(torch.float32))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("keys", "is_tied"),
    [
        ((), False),
        (("--use_dora=true",), False),
        (("--modules_to_save=lm_head",), False),
        (("--modules_to_save=lm_head",), True),
        (("--lora_target_modules=q_proj,lm_head", "--use_rslora=true"), True),
        (("--init_lora_weights=pissa",), False),
    ],
    ids=str,
)
def test_merged_model_answers_as_base_and_adapter(
    keys: tuple[str, ...], is_tied: bool, tmp_path: Path
) -> None:
    tie(tmp_path, is_tied)
    run = make_run(tmp_path, *keys)
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    trained = adapted(tmp_path / "model", config_of_run(run))
    shake(trained)
    got = logits_of(of_disk(tmp_path / "out"))
    torch.testing.assert_close(got, logits_of(trained), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, logits_of(of_disk(tmp_path / "model")), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert {one.suffix for one in (tmp_path / "out").iterdir()} <= {
        ".json", ".safetensors", ".md", ".jinja",
    }  # fmt: skip


def tie(root: Path, is_tied: bool) -> None:
    """Make the tiny model, its head tied to the embeddings where wanted."""
    from support.tiny_model import write_model, write_rows

    folder = write_model(root / "model")
    write_rows(root / "held-out.jsonl", 900, 6)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": is_tied}))
    if is_tied:
        # A head that is stored with other values would be kept apart on loading.
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_keep_the_type_that_the_base_model_has(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    of_disk(tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert types == {torch.bfloat16}


def test_card_of_the_merged_model_keeps_what_is_known_of_its_training(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# run, merged" in card
    assert "## Training data" in card
    assert "PeftModel" not in card


def test_model_that_answers_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    before = sorted(tmp_path.iterdir())
    # As a merge would that forgets the adapter.
    monkeypatch.setattr(merge, "_merged", lambda model: model.unload())
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 70
    assert "differs from base model and adapter" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_merged_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path), tmp_path / "out"
    monkeypatch.setattr(merge, "open_model", None)
    assert cli.main(["merge", str(tmp_path / "model"), str(out)]) == 78
    assert cli.main(["merge", str(run), str(run)]) == 78
    with monkeypatch.context() as context:
        context.setattr(new_folder, "free_disk_bytes", lambda _: 1000)
        assert cli.main(["merge", str(run), str(out)]) == 74
    monkeypatch.setattr(merge, "stored_weights", lambda *_: merge.Stored("bfloat16", 10**14))
    monkeypatch.setattr(new_folder, "free_disk_bytes", lambda _: 10**15)
    assert cli.main(["merge", str(run), str(out)]) == 137
    printed = capsys.readouterr().err
    for words in (
        "no adapter to merge",
        "already exists",
        "not enough disk space",
        "not enough memory",
    ):
        assert words in printed
    assert not out.exists()


def test_adapter_that_makes_up_for_rounding_is_not_merged_into_unrounded_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    record = json.loads((run / "config.resolved.json").read_text())
    record["lora"]["init_lora_weights"]["value"] = "loftq"
    (run / "config.resolved.json").write_text(json.dumps(record))
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 78
    assert "LoftQ adapter cannot be merged" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_size_of_a_merged_model_with_parted_embeddings_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tie(tmp_path, is_tied=True)
    run = make_run(tmp_path, "--modules_to_save=embed_tokens,lm_head")
    asked: list[int] = []
    monkeypatch.setattr(merge, "refuse_full_disk", lambda _, needed: asked.append(needed))
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written > 1.2 * (tmp_path / "model" / "model.safetensors").stat().st_size
    assert asked[0] == pytest.approx(written, rel=0.02)
    shown = capsys.readouterr()
    assert f"({size(written)}, float32)" in shown.out
    assert "tie_word_embeddings" not in shown.err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "keys", ["--modules_to_save=embed_tokens", "--lora_target_modules=q_proj,embed_tokens"]
)
def test_embeddings_that_changed_alone_are_no_longer_the_head(keys: str, tmp_path: Path) -> None:
    tie(tmp_path, is_tied=True)
    run = make_run(tmp_path, keys)
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    trained = adapted(tmp_path / "model", config_of_run(run))
    shake(trained)
    got = logits_of(of_disk(tmp_path / "out"))
    torch.testing.assert_close(got, logits_of(trained), rtol=1e-4, atol=1e-4)
