"""Uploads to the hub: what goes, who may read it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_trainer.cli import main
from lora_trainer.host.disk import write_checksums
from support.push import TOKEN


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a finished run's folder with an adapter, and things that nobody means to upload."""
    final = tmp_path / "run" / "final_model"
    final.mkdir(parents=True)
    (final / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b"}))
    (final / "adapter_model.safetensors").write_bytes(b"weights")
    (final / "README.md").write_text("# card")
    write_checksums(final)
    (final / "optimizer.pt").write_bytes(b"pickled")
    (final / "base_model").mkdir()
    (final / "base_model" / "model.safetensors").write_bytes(b"base")
    (tmp_path / "run" / "train.log").write_text("log")
    return tmp_path / "run"


def test_adapter_goes_to_a_private_repository_and_nothing_else_does(hub, run, capsys):
    assert main(["push", str(run), "me/mine"]) == 0
    assert hub.private == {"me/mine": True}
    assert set(hub.files["me/mine"]) == {
        "README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert hub.files["me/mine"]["adapter_model.safetensors"] == b"weights"
    shown = capsys.readouterr()
    assert f"uploaded: {hub.url}/me/mine" in shown.out
    assert TOKEN not in shown.out + shown.err


def test_public_repository_has_to_be_meant(hub, run, capsys):
    hub.private["me/mine"] = False
    assert main(["push", str(run), "me/mine"]) == 78
    assert "add --public" in capsys.readouterr().err
    assert hub.files == {}
    assert main(["push", str(run), "me/mine", "--public"]) == 0
    assert hub.files["me/mine"]


def test_token_that_the_hub_refuses_ends_in_77_and_is_not_shown(hub, run, monkeypatch, capsys):
    wrong = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    assert main(["push", str(run), "me/mine"]) == 77
    shown = capsys.readouterr().err
    assert "write access" in shown
    assert wrong not in shown


def test_upload_without_a_token_is_refused_before_the_hub_is_asked(hub, run, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/mine"]) == 77
    shown = capsys.readouterr().err
    assert "there is no token for the hub" in shown
    assert "export HF_TOKEN" in shown


def test_changed_weights_are_not_uploaded(hub, run, capsys):
    (run / "final_model" / "adapter_model.safetensors").write_bytes(b"other")
    assert main(["push", str(run), "me/mine"]) == 69
    assert "adapter_model.safetensors: the hash is not" in capsys.readouterr().err
    assert hub.private == {}


def test_unfinished_run_is_refused_with_the_way_to_an_adapter(hub, tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/mine"]) == 78
    assert f"lora-trainer export {tmp_path} TARGET" in capsys.readouterr().err


def test_base_model_named_by_a_path_is_pointed_out(hub, run, capsys):
    config = run / "final_model" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "/data/llama"}))
    write_checksums(run / "final_model")
    (run / "final_model" / "optimizer.pt").unlink()
    assert main(["push", str(run), "me/mine"]) == 0
    assert "a path of this machine (/data/llama)" in capsys.readouterr().err


def test_hub_out_of_reach_ends_in_69(run, hub, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/mine"]) == 69
    assert "the hub cannot be reached" in capsys.readouterr().err
