"""Folders that a user may name in the hope of a trained adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_trainer.commands.export import export_adapter
from lora_trainer.commands.finetuned import EMBEDDED_HUB_ID, find, open_model
from lora_trainer.config.schema import EMBEDDED_MODEL
from lora_trainer.config.start_adapter import find_adapter
from lora_trainer.errors import ConfigError, UnavailableError
from lora_trainer.host.disk import write_checksums
from support.run_folders import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


def test_run_and_its_final_model_are_the_same_adapter(run: Path) -> None:
    by_run, by_adapter = find(str(run)), find(str(run / "final_model"))
    assert by_run == by_adapter
    assert by_run.adapter == run / "final_model"
    assert by_run.config.model.model_name_or_path == str(run.parent / "model")


def test_adapter_moved_away_from_its_run_names_its_base(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "final_model", tmp_path / "alone"))
    adapter = find(str(alone))
    assert adapter.run is None
    assert adapter.config.model.model_name_or_path == str(run.parent / "model")
    assert open_model(adapter).has_adapter


def test_adapter_of_the_embedded_model_stands_on_the_embedded_model(
    run: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(run / "final_model", tmp_path / "alone"))
    config = json.loads((alone / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = EMBEDDED_HUB_ID
    (alone / "adapter_config.json").write_text(json.dumps(config))
    assert find(str(alone)).config.model.model_name_or_path == EMBEDDED_MODEL
    other = find(str(alone), model_name_or_path="owner/name")
    assert other.config.model.model_name_or_path == "owner/name"


def test_base_model_alone_has_no_adapter(run: Path) -> None:
    assert find(str(run.parent / "model")).adapter is None
    assert find(EMBEDDED_MODEL).config.model.model_name_or_path == EMBEDDED_MODEL
    assert find("owner/name").config.model.model_name_or_path == "owner/name"


def test_exported_adapter_that_has_changed_is_refused_by_all_that_read_it(
    run: Path, tmp_path: Path
) -> None:
    final = Path(shutil.copytree(run / "final_model", tmp_path / "run" / "final_model"))
    write_checksums(final)
    assert find(str(final)).adapter == final
    card, weights = final / "README.md", final / "adapter_model.safetensors"
    card.write_text(card.read_text() + "and a word of the user's\n")
    assert find(str(final)).adapter == final
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UnavailableError, match="changed since it was exported"):
        find(str(final))
    with pytest.raises(UnavailableError, match="changed since it was exported"):
        export_adapter(str(final.parent), tmp_path / "copy")
    with pytest.raises(ConfigError) as caught:
        find_adapter(str(final))
    assert "SHA256SUMS" in caught.value.problems[0].why
    (final / "SHA256SUMS").unlink()  # the user says so
    assert find(str(final)).adapter == final
    assert find_adapter(str(final)).weights == weights


def test_unfinished_run_names_the_command_that_helps(tmp_path: Path) -> None:
    unfinished = make_run(tmp_path, is_finished=False)
    for named in (unfinished, unfinished / "checkpoints" / "step-000007"):
        with pytest.raises(ConfigError, match="no final adapter yet") as caught:
            find(str(named))
        assert f"lora-trainer export {named} TARGET" in caught.value.block()


def test_folder_of_runs_proposes_them(run: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        find(str(run.parent))
    assert f"did you mean {run}" in caught.value.block()


@pytest.mark.parametrize("named", ["nothing/here/at/all", "./nothing", "/dev/null", "x\ny"])
def test_wrong_place_is_told(named: str) -> None:
    with pytest.raises(UnavailableError, match=r"no such folder|no trained adapter"):
        find(named)


def test_pickled_adapter_is_not_read(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "final_model", tmp_path / "alone"))
    (alone / "adapter_model.safetensors").rename(alone / "adapter_model.bin")
    with pytest.raises(UnavailableError, match="no safetensors"):
        find(str(alone))


@pytest.mark.parametrize("text", ["{", "[]", '{"base_model_name_or_path"', ""])
def test_broken_adapter_config_is_no_traceback(run: Path, tmp_path: Path, text: str) -> None:
    alone = Path(shutil.copytree(run / "final_model", tmp_path / "alone"))
    (alone / "adapter_config.json").write_text(text)
    with pytest.raises(UnavailableError, match="cannot be read"):
        find(str(alone))


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', '{"model": {"use_4bit": {}}}'])
def test_broken_record_of_a_run_is_no_traceback(run: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "config.resolved.json").write_text(text)
    with pytest.raises(UnavailableError, match="cannot be read"):
        find(str(copy))


def test_base_model_that_has_moved_names_the_flag(run: Path) -> None:
    moved = find(str(run), model_name_or_path="/moved/away")
    with pytest.raises(UnavailableError) as caught:
        open_model(moved)
    assert "--model FOLDER_OR_HUB_ID" in caught.value.block()


def test_adapter_on_a_base_of_another_width_is_refused(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "final_model", tmp_path / "alone"))
    from safetensors.torch import load_file, save_file

    file = alone / "adapter_model.safetensors"
    save_file({name: weights[:, :3].clone() for name, weights in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="does not fit this base model"):
        open_model(find(str(alone)))
