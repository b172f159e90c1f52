"""Which of two runs counts, the one in the local folder or the one in the store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_trainer.checkpoint_folder import verify
from lora_trainer.commands.check import preflight_faults
from lora_trainer.config.settings import Settings, resolve
from lora_trainer.errors import AccessError, BusyError, ConfigError
from lora_trainer.remote import folder as remote_folder
from lora_trainer.remote import lease
from lora_trainer.remote.folder import RemoteFolder
from lora_trainer.run.folder import output_folder
from lora_trainer.supervise import mirroring
from lora_trainer.supervise.mirroring import NoMirror, mirror_of
from support import stores

ADDRESS = "faulty://bucket/runs"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    stores.reset(monkeypatch)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(remote_folder, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(mirroring, "STOP_SECONDS", 0.5)


class Machine:
    """A disk, on which runs are started; what each start says is kept."""

    def __init__(self, disk: Path) -> None:
        options = ["--output_dir", ADDRESS, "--run_name", "mine", "--output_cache_dir", str(disk)]
        self.settings: Settings = resolve(None, {}, options)
        self.local = output_folder(self.settings)
        self.local.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []

    def start(self) -> NoMirror:
        return mirror_of(self.settings, self.notes.append, lambda: False)

    def train(self, *steps: int, digest: str = "d", is_finished: bool = False) -> None:
        run = self.start()
        with run.held():
            run.begin(has_work=True)
            stores.new_run(self.local)
            (self.local / "config.digest").write_text(digest)
            for step in steps:
                stores.add_checkpoint(self.local, step)
            if is_finished:
                stores.finish(self.local)
            run.complete()

    def steps(self) -> list[int]:
        folders = sorted((self.local / "checkpoints").glob("step-*"))
        for path in folders:
            verify(path)
        return [int(path.name.removeprefix("step-")) for path in folders]


def test_run_goes_on_where_another_machine_left_it(tmp_path: Path) -> None:
    Machine(tmp_path / "a").train(5)
    other = Machine(tmp_path / "b")
    with other.start().held():
        assert other.steps() == [5]
    assert other.notes == [f"continuing the run in {ADDRESS}/mine"]


def test_own_folder_counts_if_it_was_the_last_to_write(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    machine.train(5)
    stores.add_checkpoint(machine.local, 10)  # saved, and killed before it was mirrored
    with machine.start().held():
        assert machine.steps() == [5, 10]


def test_run_that_was_brought_by_half_is_brought_again(tmp_path: Path) -> None:
    Machine(tmp_path / "a").train(5)
    other = Machine(tmp_path / "b")
    stores.FaultyStore.fault = staticmethod(
        lambda kind, path: PermissionError("expired") if path.endswith("rng.safetensors") else None
    )
    with pytest.raises(AccessError), other.start().held():
        raise AssertionError("it was brought")
    assert (other.local / "config.digest").exists()
    stores.FaultyStore.fault = staticmethod(lambda *_: None)
    with Machine(tmp_path / "b").start().held():
        assert other.steps() == [5]


def test_store_counts_once_another_machine_has_got_further(tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "a"), Machine(tmp_path / "b")
    first.train(5)
    second.train(10)
    with first.start().held():
        assert first.steps() == [10]
    assert not list(first.local.parent.glob(f"{first.local.name}.*"))


def test_local_run_that_the_store_does_not_have_is_moved_aside(tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "a"), Machine(tmp_path / "b")
    first.train(5)
    second.train(10, digest="another")
    stores.add_checkpoint(first.local, 15)
    run = first.start()
    with run.held():
        assert first.steps() == [10]
        (note,) = run.warnings()
    aside = first.local / "run.1"
    assert str(aside) in note
    assert (aside / "checkpoints" / "step-000015").is_dir()


def test_finished_run_is_known_as_finished_on_another_machine(tmp_path: Path) -> None:
    Machine(tmp_path / "a").train(5, is_finished=True)
    other = Machine(tmp_path / "b")
    with other.start().held():
        assert (other.local / "DONE").exists()
        assert (other.local / "final_model" / "adapter_model.safetensors").exists()


def test_finished_run_that_was_not_mirrored_is_by_the_next_start(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    machine.train(5)
    stores.finish(machine.local)
    run = machine.start()
    with run.held():
        run.begin(has_work=False)
    assert "DONE" in stores.stored(f"{ADDRESS}/mine")


def test_what_the_store_has_already_stays_there_untouched(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    machine.train(5, is_finished=True)
    stores.FaultyStore.operations.clear()
    run = machine.start()
    with run.held():
        run.begin(has_work=False)
    touched = {path for kind, path in stores.FaultyStore.operations if kind in ("write", "remove")}
    assert not any("step-" in path or path.endswith(".safetensors") for path in touched)
    assert not any(kind == "remove" for kind, _ in stores.FaultyStore.operations)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_checkpoint_of_a_repeated_step_replaces_a_damaged_one_only(
    tmp_path: Path, is_damaged: bool
) -> None:
    machine = Machine(tmp_path / "a")
    machine.train(5)
    shutil.rmtree(machine.local / "checkpoints")
    stores.add_checkpoint(machine.local, 5, text="saved again")
    folder, name = RemoteFolder(f"{ADDRESS}/mine"), "checkpoints/step-000005/rng.safetensors"
    if is_damaged:
        folder.write(name, b"x")
    run = machine.start()
    with run.held():
        run.begin(has_work=True)
        run.complete()
    assert (b"saved again" in (folder.read(name) or b"")) is is_damaged
    other = Machine(tmp_path / "b")
    with other.start().held():
        assert other.steps() == [5]


def test_run_that_is_stopped_leaves_its_last_checkpoint_in_the_store(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    run = machine.start()
    with pytest.raises(KeyboardInterrupt), run.held():
        run.begin(has_work=True)
        stores.add_checkpoint(stores.new_run(machine.local), 5)
        raise KeyboardInterrupt
    assert "checkpoints/step-000005/manifest.json" in stores.stored(f"{ADDRESS}/mine")
    assert b'"is_released": true' in (RemoteFolder(f"{ADDRESS}/mine").read(".lock") or b"")


def test_stopped_run_whose_store_fails_says_where_its_files_are(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    run = machine.start()
    with pytest.raises(KeyboardInterrupt), run.held():
        run.begin(has_work=True)
        stores.FaultyStore.fault = staticmethod(lambda *_: PermissionError("expired"))
        stores.add_checkpoint(stores.new_run(machine.local), 5)
        raise KeyboardInterrupt
    assert f"{machine.local} has it all" in machine.notes[-1]


def test_archived_run_is_moved_aside_in_the_store_and_not_kept_twice(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a")
    machine.train(5, is_finished=True)
    run = machine.start()
    with run.held():
        assert run.archive(machine.local) == f"{ADDRESS}/mine.1"
        assert not (machine.local / "DONE").exists()
    assert "DONE" in stores.stored(f"{ADDRESS}/mine.1")


def test_run_of_another_machine_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "STALE_SECONDS", 5.0)
    first, second = Machine(tmp_path / "a"), Machine(tmp_path / "b")
    with first.start().held(), pytest.raises(BusyError), second.start().held():
        raise AssertionError("both run")


def test_preflight_refuses_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    stores.FaultyStore.fault = staticmethod(
        lambda kind, _: PermissionError("Access Denied") if kind == "write" else None
    )
    faults = [f for f in preflight_faults(Machine(tmp_path).settings) if isinstance(f, AccessError)]
    assert f"{ADDRESS}/mine" in faults[0].block()


def test_adapter_to_start_from_is_not_on_a_store() -> None:
    with pytest.raises(ConfigError, match="adapter_name_or_path cannot be on an object store"):
        resolve(None, {}, ["--adapter_name_or_path", f"{ADDRESS}/mine"])


def test_local_output_folder_has_no_mirror(tmp_path: Path) -> None:
    settings = resolve(None, {}, ["--output_dir", str(tmp_path)])
    run = mirror_of(settings, print, lambda: False)
    assert type(run) is NoMirror
