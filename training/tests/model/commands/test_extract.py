"""Adapters out of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_trainer import cli
from lora_trainer.commands import new_folder
from lora_trainer.commands.finetuned import config_of_run, find
from lora_trainer.model.compat import dtype_argument
from support.run_folders import STEP, adapted, logits_of, make_run, shake


def loaded(folder: Path, base: Path):
    model = AutoModelForCausalLM.from_pretrained(base, **dtype_argument(torch.float32))
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("--use_dora=true",),
        ("--modules_to_save=lm_head",),
        ("--lora_target_modules=q_proj,lm_head", "--use_rslora=true"),
        ("--init_lora_weights=olora",),
        ("--init_lora_weights=pissa", "--use_rslora=true"),
    ],
    ids=" ".join,
)
def test_plain_peft_loads_what_an_unfinished_run_had_learnt(
    keys: tuple[str, ...], tmp_path: Path
) -> None:
    run = make_run(tmp_path, *keys, is_finished=False)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    trained = adapted(tmp_path / "model", config_of_run(run))
    shake(trained)
    got = logits_of(loaded(tmp_path / "out", tmp_path / "model"))
    torch.testing.assert_close(got, logits_of(trained), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_checkpoint_gives_the_same_as_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_finished=False)
    for named, out in ((run, "a"), (run / "checkpoints" / f"step-{STEP:06d}", "b")):
        assert cli.main(["export", str(named), str(tmp_path / out)]) == 0
    a, b = (tmp_path / out / "adapter_model.safetensors" for out in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_finished_run_gives_its_final_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "the run is finished" in capsys.readouterr().out
    for one in (run / "final_model").iterdir():
        assert (tmp_path / "out" / one.name).read_bytes() == one.read_bytes()


def test_card_says_of_which_step_the_adapter_is_and_what_it_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_finished=False)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# run, step {STEP}" in card
    assert "| loss | not measured | 0.5 |" in card


def test_exported_tokenizer_has_the_template_of_the_run(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    run = make_run(tmp_path, f"--chat_template={template}", is_finished=False)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_damaged_checkpoint_is_passed_over_and_alone_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, is_finished=False)
    newest = run / "checkpoints" / f"step-{STEP + 1:06d}"
    newest.mkdir()
    (newest / "state.json").write_text("{}")
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert f"step-{STEP + 1:06d}" in capsys.readouterr().err
    (newest / "manifest.json").write_text("{}")
    assert cli.main(["export", str(newest), str(tmp_path / "other")]) == 69
    assert "damaged" in capsys.readouterr().err


def test_nothing_is_ever_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, is_finished=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 78
    assert cli.main(["export", str(run), str(tmp_path / "out" / "mine")]) == 78
    assert cli.main(["export", str(run), str(tmp_path / "out" / "mine" / "below")]) == 78
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine"]
    assert "already exists" in capsys.readouterr().err


def test_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, is_finished=False)
    monkeypatch.setattr(new_folder, "free_disk_bytes", lambda _: 1000)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 74
    assert "not enough disk space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failing_on_the_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, is_finished=False)
    before = sorted(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr("lora_trainer.report.model_card.write_model_card", full)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 74
    assert sorted(tmp_path.iterdir()) == before


def test_place_without_a_checkpoint_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 69
    assert cli.main(["export", str(tmp_path / "no"), str(tmp_path / "out")]) == 69
    printed = capsys.readouterr().err
    assert "there is no checkpoint" in printed
    assert "there is no such folder" in printed


def test_run_whose_record_is_gone_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, is_finished=False)
    (run / "config.resolved.json").unlink()
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 69
    assert "config.resolved.json" in capsys.readouterr().err


def test_no_secret_reaches_an_export(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--hf_token=hf_verysecret", is_finished=False)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    texts = [one.read_bytes() for one in (tmp_path / "out").iterdir()]
    assert not any(b"hf_verysecret" in text for text in texts)
    assert json.loads((run / "config.resolved.json").read_text())["model"]["hf_token"]["value"]


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
def test_export_with_base_needs_nothing_of_the_machine_it_was_trained_on(
    is_finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    run = make_run(tmp_path / "here", is_finished=is_finished)
    expected = logits_of(loaded_after_export(run, tmp_path / "plain"))
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--with-base"]) == 0
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    card = (moved / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("base_model")' in card
    monkeypatch.chdir(moved)
    torch.testing.assert_close(logits_of(loaded(Path(), Path("base_model"))), expected)
    source = find(str(moved))
    assert source.config.model.model_name_or_path == str(moved / "base_model")
    assert cli.main(["chat", str(moved), "--prompt", "hello", "--max-new-tokens", "2"]) == 0


def loaded_after_export(run: Path, target: Path):
    """Return the model with a run's adapter, from a plain export."""
    assert cli.main(["export", str(run), str(target)]) == 0
    return loaded(target, run.parent / "model")
