"""The model inside: made once, sealed, made again when it is damaged; nothing pickled is read."""

from __future__ import annotations

import json
import os

import pytest

from lora_trainer.config.schema import ModelSection
from lora_trainer.data import fingerprint
from lora_trainer.errors import UnavailableError
from lora_trainer.model import embedded, load


@pytest.fixture(scope="module")
def prepared():
    return embedded.prepare(load.default_cache())


def test_a_prepared_folder_holds_a_model_a_tokenizer_and_their_seals(prepared):
    names = {path.name for path in prepared.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json"} <= names
    assert not any(name.endswith(load.PICKLES) for name in names)
    assert embedded.is_sound(prepared)


def test_a_changed_byte_a_missing_file_and_no_manifest_are_all_noticed(tmp_path):
    for damage in ("flip", "missing", "manifest"):
        folder = tmp_path / damage
        folder.mkdir()
        (folder / "a.bin").write_bytes(b"abc")
        (folder / "manifest.json").write_text(
            json.dumps({"a.bin": embedded._entry(folder / "a.bin")})
        )
        assert embedded.is_sound(folder)
        if damage == "flip":
            (folder / "a.bin").write_bytes(b"abd")
        elif damage == "missing":
            (folder / "a.bin").unlink()
        else:
            (folder / "manifest.json").write_text("[]")
        assert not embedded.is_sound(folder)


def test_prepared_files_are_hashed_once_until_they_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -1.0)
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "a.bin"
    file.write_bytes(b"abc")
    (folder / "manifest.json").write_text(json.dumps({"a.bin": embedded._entry(file)}))
    assert embedded.is_sound(folder)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint.hashlib, "sha256", None)
        assert embedded.is_sound(folder)
    before = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not embedded.is_sound(folder)


def test_a_folder_with_pickled_weights_only_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnavailableError) as caught:
        load.locate(ModelSection(model_name_or_path=str(tmp_path)))
    assert "pytorch_model.bin" in caught.value.problems[0].why


def test_a_path_that_is_not_there_is_no_hub_id():
    for name in ("/no/such/model", "./model", "a/b/c"):
        with pytest.raises(UnavailableError, match="does not exist"):
            load.locate(ModelSection(model_name_or_path=name))
    assert load.locate(ModelSection(model_name_or_path="owner/name")).hub_id == "owner/name"


def test_the_licence_of_a_local_model_is_read_from_its_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\ntext\n")
    assert load.find_license(load.ModelSource(str(tmp_path), "x")) == "mit"
    (tmp_path / "README.md").write_text("no front matter\n")
    assert load.find_license(load.ModelSource(str(tmp_path), "x")) == ""


def test_a_file_planted_in_the_cache_makes_the_folder_unsound(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    manifest = {"config.json": embedded._entry(tmp_path / "config.json")}
    (tmp_path / embedded.MANIFEST).write_text(json.dumps(manifest))
    assert embedded.is_sound(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"pickled")
    assert not embedded.is_sound(tmp_path)
