"""Whatever is in a checkpoint's place: skipped by name, never followed, and never removed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lora_trainer.checkpoint_folder import FILES, MANIFEST, has_any, listed, remove, verify
from lora_trainer.errors import AccessError, ConfigError
from lora_trainer.train.checkpoint import misfit
from lora_trainer.train.checkpoint_store import CheckpointStore
from support.snapshots import DIGEST, snapshot_at, steps_of


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, digest=DIGEST)


def reseal(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and its entry in the manifest, so that all hashes agree."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))


def with_state(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((path / "state.json").read_text())
    change(raw)
    reseal(path, "state.json", json.dumps(raw).encode())


def unknown_key(path: Path) -> None:
    with_state(path, lambda raw: raw["state"].update(surprise=1))


def wrong_type(path: Path) -> None:
    with_state(path, lambda raw: raw["state"].update(tokens_seen="many"))


def wrong_nesting(path: Path) -> None:
    with_state(path, lambda raw: raw["state"].update(best_step=[[1]]))


def no_state(path: Path) -> None:
    with_state(path, lambda raw: raw.update(state=None))


def no_object(path: Path) -> None:
    reseal(path, "state.json", b"[1, 2]")


def odd_generators(path: Path) -> None:
    with_state(path, lambda raw: raw["generators"].update(python=[3, [1, 2], None]))


def no_generators(path: Path) -> None:
    with_state(path, lambda raw: raw.update(generators=7))


def deep_nesting(path: Path) -> None:
    reseal(path, "state.json", b"[" * 200_000)


def deep_manifest(path: Path) -> None:
    (path / MANIFEST).write_bytes(b'{"a":' * 10_000)


def odd_manifest(path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({name: [1] for name in FILES}))


def other_tensors(path: Path) -> None:
    reseal(path, "adapter.safetensors", b"no safetensors")


def no_torch_generator(path: Path) -> None:
    reseal(path, "rng.safetensors", save({"cpu": torch.zeros(3)}))


def of_another_step(path: Path) -> None:
    remove(path)
    path.mkdir()
    for name in (*FILES, MANIFEST):
        shutil.copy(path.with_name("step-000001") / name, path / name)


def of_another_run(path: Path) -> None:
    with_state(path, lambda raw: raw.update(digest="of somebody else"))


def a_file(path: Path) -> None:
    remove(path)
    path.write_text("mine")


def a_link(path: Path) -> None:
    remove(path)
    path.symlink_to("step-000001")


def a_broken_link(path: Path) -> None:
    remove(path)
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def a_pipe_inside(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def a_link_inside(path: Path) -> None:
    (path / "state.json").rename(path.parent / "elsewhere.json")
    (path / "state.json").symlink_to("../elsewhere.json")


def a_folder_inside(path: Path) -> None:
    (path / "rng.safetensors").unlink()
    (path / "rng.safetensors").mkdir()


def one_more_file(path: Path) -> None:
    (path / "notes.txt").write_text("mine")


def empty_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


ODD = [
    unknown_key, wrong_type, wrong_nesting, no_state, no_object, odd_generators, no_generators,
    deep_nesting, deep_manifest, odd_manifest, other_tensors, no_torch_generator, of_another_step,
    of_another_run, a_file, a_link, a_broken_link, a_pipe, a_pipe_inside, a_link_inside,
    a_folder_inside, one_more_file, empty_folder,
]  # fmt: skip
# What still proves to be this run's and of its step goes when its time has come.
STILL_OURS = {
    unknown_key, wrong_type, wrong_nesting, odd_generators, no_generators, deep_manifest,
    odd_manifest, other_tensors, no_torch_generator,
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return all that is in a folder, by path: a file's content, a link's target."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("make_odd", ODD, ids=lambda make: make.__name__)
def test_odd_checkpoint_is_skipped_by_name_for_the_sound_one_before(
    store: CheckpointStore, make_odd: Callable[[Path], None]
) -> None:
    store.save(snapshot_at(1))
    make_odd(store.save(snapshot_at(2)))
    read, skipped = store.newest()
    assert read is not None
    assert read.state.step == 1
    assert [reason.split(":")[0] for reason in skipped] == ["step-000002"]


@pytest.mark.parametrize("make_odd", ODD, ids=lambda make: make.__name__)
def test_odd_checkpoint_that_is_not_ours_outlives_saves_at_its_step_and_later(
    store: CheckpointStore, make_odd: Callable[[Path], None]
) -> None:
    store.save(snapshot_at(1))
    make_odd(store.save(snapshot_at(2)))
    odd = store.path_of(2)
    before = tree(store.folder)
    kept = {name: content for name, content in before.items() if name.startswith(odd.name)}
    for step in (3, 4, 5):
        store.save(snapshot_at(step))
    after = tree(store.folder)
    if make_odd in STILL_OURS:
        assert not os.path.lexists(odd)
    else:
        assert {name: after.get(name, "gone") for name in kept} == kept
    store.save(snapshot_at(2))
    verify(odd)
    if make_odd not in STILL_OURS:
        (aside,) = store.set_aside
        now = tree(store.folder)
        renamed = {name.replace(odd.name, aside.name, 1): kept[name] for name in kept}
        assert {name: now.get(name, "gone") for name in renamed} == renamed


def test_folder_with_more_than_a_step_in_its_name_is_neither_read_nor_removed(
    store: CheckpointStore,
) -> None:
    store.save(snapshot_at(8))
    names = ["step-000008-keep", "step-8", "step-8-keep", "step-0000008", "step-\u0661", "mine"]
    for name in names:
        shutil.copytree(store.path_of(8), store.folder / name)
    for step in (9, 10, 11):
        store.save(snapshot_at(step))
    assert {path.name for path in store.folder.iterdir()} == {*names, "step-000010", "step-000011"}
    for step in (10, 11):
        shutil.rmtree(store.path_of(step))
    assert store.newest() == (None, [])
    assert not has_any(store.folder)


def test_temporary_folder_that_is_the_users_is_left_alone(store: CheckpointStore) -> None:
    mine = store.folder / ".writing-step-000002"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    (store.folder / ".writing-notes").mkdir()
    (store.folder / ".writing-step-000003").symlink_to(mine)
    store.save(snapshot_at(2))
    store.save(snapshot_at(3))
    assert (mine / "notes.txt").read_text() == "mine"
    assert (store.folder / ".writing-notes").is_dir()
    assert (store.folder / ".writing-step-000003").is_symlink()
    assert [path.name for path in listed(store.folder)] == ["step-000002", "step-000003"]


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Go on as a user who may not read what is closed to others; root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def reachable(tmp_path: Path) -> Iterator[None]:
    """Let every user into the folder of this test."""
    opened = [path for path in (tmp_path, *tmp_path.parents) if path.stat().st_uid == os.getuid()]
    modes = {path: path.stat().st_mode for path in opened if path != path.parent}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


def test_unreadable_checkpoint_is_skipped_by_name(store: CheckpointStore, reachable: None) -> None:
    store.save(snapshot_at(1))
    store.save(snapshot_at(2)).chmod(0)
    with as_nobody():
        read, skipped = store.newest()
    store.path_of(2).chmod(0o755)
    assert read is not None
    assert read.state.step == 1
    assert skipped[0].startswith("step-000002: no permission")


def test_run_whose_checkpoints_are_all_unreadable_ends_with_77(
    store: CheckpointStore, reachable: None
) -> None:
    for step in (1, 2):
        store.save(snapshot_at(step)).chmod(0)
    with as_nobody(), pytest.raises(AccessError, match="no checkpoint can be read"):
        store.newest()
    store.folder.chmod(0)
    with as_nobody(), pytest.raises(AccessError, match="no checkpoint can be read") as caught:
        store.newest()
    assert "chmod" in caught.value.problems[0].remedy
    for path in (store.folder, store.path_of(1), store.path_of(2)):
        path.chmod(0o755)


def test_file_in_place_of_the_checkpoints_folder_is_a_configuration_error(
    store: CheckpointStore,
) -> None:
    store.folder.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        store.newest()


def test_checkpoints_may_be_on_another_disk_through_a_link(
    store: CheckpointStore, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    store.folder.symlink_to(tmp_path / "disk")
    for step in (1, 2, 3):
        store.save(snapshot_at(step))
    read, _ = store.newest()
    assert read is not None
    assert steps_of(store) == [2, 3]


def test_checkpoint_that_fits_no_parameter_is_refused_by_name() -> None:
    snapshot = snapshot_at(1)
    assert misfit(snapshot, {"a.weight": torch.nn.Parameter(torch.ones(3, 2))}) == ""
    assert "a.weight" in misfit(snapshot, {"a.weight": torch.nn.Parameter(torch.ones(2, 3))})
    assert "other parameters" in misfit(snapshot, {"b": torch.nn.Parameter(torch.ones(3, 2))})
    moments = snapshot.optimizer | {"a.weight.exp_avg": torch.ones(9)}
    odd = replace(snapshot, optimizer=moments)
    assert "shape" in misfit(odd, {"a.weight": torch.nn.Parameter(torch.ones(3, 2))})
