"""The identity of a base model is its content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from lora_trainer.config.schema import ModelSection
from lora_trainer.data.fingerprint import FileHashes
from lora_trainer.errors import UnavailableError
from lora_trainer.train import identity
from lora_trainer.train.identity import BaseHash, Identity, other_run
from support.tiny_model import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def hashed(folder: Path, **section: object) -> str:
    cache = str(folder.parent / "cache")
    return BaseHash(folder, ModelSection(model_cache_dir=cache, **section)).result()  # type: ignore[arg-type]


def test_path_does_not_count(model: Path) -> None:
    elsewhere = shutil.copytree(model, model.with_name("elsewhere"))
    assert hashed(model) == hashed(elsewhere)


def test_one_bit_in_the_weights_counts_though_size_and_mtime_stay(model: Path) -> None:
    before, weights = hashed(model), model / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    with weights.open("r+b") as file:
        file.write(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashed(model) != before


def test_config_counts_by_its_values(model: Path) -> None:
    before, path = hashed(model), model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert hashed(model) == before
    path.write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert hashed(model) != before


def test_code_counts_only_where_it_is_run(model: Path) -> None:
    before = hashed(model)
    (model / "modeling.py").write_text("x = 1\n")
    assert hashed(model) == before
    assert hashed(model, trust_remote_code=True) != before


def test_shards_of_the_index_count_and_stray_files_do_not(model: Path) -> None:
    whole = (model / "model.safetensors").rename(model / "part-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": whole.name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    before = hashed(model)
    (model / "stray.safetensors").write_bytes(b"x")
    assert hashed(model) == before
    whole.write_bytes(b"y")
    assert hashed(model) != before


def test_unchanged_weights_are_not_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in model.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr("lora_trainer.data.fingerprint.SETTLED_SECONDS", -1.0)
    before = hashed(model)
    monkeypatch.setattr("lora_trainer.data.fingerprint.hashlib", None)
    assert hashed(model) == before
    (model / "model.safetensors").chmod(0o600)  # changes the ctime
    with pytest.raises(AttributeError):
        hashed(model)


def test_file_in_the_hubs_cache_counts_by_its_name_there(model: Path) -> None:
    before = hashed(model)
    weights = model / "model.safetensors"
    blobs = model.parent / "blobs"
    blobs.mkdir()
    blob = weights.rename(blobs / hashlib.sha256(weights.read_bytes()).hexdigest())
    weights.symlink_to(blob)
    assert hashed(model) == before
    blob.write_bytes(b"never read")
    assert hashed(model) == before


def test_change_while_the_model_loads_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    content_hash = identity._content_hash

    def waiting(path: Path, hashes: FileHashes) -> str:
        may_go_on.wait(60)
        return content_hash(path, hashes)

    monkeypatch.setattr(identity, "_content_hash", waiting)
    base = BaseHash(model, ModelSection(model_cache_dir=str(model.parent / "cache")))
    (model / "model.safetensors").write_bytes(b"other")
    may_go_on.set()
    with pytest.raises(UnavailableError, match="changed while it was being loaded"):
        base.result()


def test_refusal_names_the_inputs_that_differ() -> None:
    mine = Identity("c" * 16, "0", "b" * 16, "d" * 16, "3", "8")
    other = Identity("c" * 16, "0", "e" * 16, "d" * 16, "3.8", "16")
    error = other_run(Path("step-000004"), str(other), str(mine))
    assert (
        "the base model's weights, the learning-rate schedule, "
        "the batch (examples per step, tokens per micro-batch)" in error.problems[0].what
    )
    assert Identity.parse(str(mine)) == mine
    old = other_run(Path("step-000004"), "0123456789abcdef-fedcba9876543210", str(mine))
    assert "earlier version" in old.problems[0].what
