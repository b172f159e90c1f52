"""The supervisor of a run whose store fails, against a worker that is a shell script."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from lora_trainer.config.settings import resolve
from lora_trainer.errors import AccessError, StoppedError
from lora_trainer.remote import folder as remote_folder
from lora_trainer.remote import mirror
from lora_trainer.run.events import CheckpointSaved, Event
from lora_trainer.run_folder import RunFolder
from lora_trainer.supervise import endings, supervisor
from lora_trainer.supervise.supervisor import Supervisor
from support import stores
from support.shell_worker import play, says, step_line

ADDRESS = "faulty://bucket/mine"
SAVED = CheckpointSaved(step=5, path="", bytes=1, seconds=1.0, is_best=False).to_line()


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    stores.reset(monkeypatch)
    monkeypatch.setattr(endings, "write_report", lambda _: None)
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(remote_folder, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_SECONDS", 0.01)


def mirrored(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Supervisor:
    """Return a run whose worker finds a checkpoint to save as its own, and then plays a script."""
    if not (folder / "ready").is_dir():
        stores.add_checkpoint(folder / "ready", 5)
    save = f'out=$(ls -d {folder}/disk/*/); cp -r {folder}/ready/checkpoints "$out" 2>/dev/null\n'

    def note(event: Event, _: object) -> None:
        if event.kind == "warning":
            (folder / "warned").touch()

    play(folder, monkeypatch, save + script)
    options = ["--output_dir", ADDRESS, "--output_cache_dir", str(folder / "disk")]
    return Supervisor(resolve(None, {}, [*options, "--health_port", "0"]), note)


def kinds_of_warning(run: Supervisor) -> list[str]:
    return [warning.message for warning in run.status.warnings]


def test_finished_run_is_in_the_store_with_done_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mirrored(tmp_path, monkeypatch, says(step_line(5), SAVED)).run() == 0
    assert stores.written(ADDRESS)[-1] == "DONE"
    names = stores.stored(ADDRESS)
    assert {"results.json", "events.jsonl", "checkpoints/step-000005/manifest.json"} <= names


def test_expired_credentials_are_one_warning_and_exit_code_77_with_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expire = f"touch {tmp_path}/expired\n"
    wait = f"while [ ! -e {tmp_path}/warned ]; do sleep 0.02; done"
    run = mirrored(tmp_path, monkeypatch, expire + says(step_line(5), SAVED) + wait)
    stores.FaultyStore.fault = staticmethod(
        lambda *_: PermissionError("expired token") if (tmp_path / "expired").exists() else None
    )
    with pytest.raises(AccessError) as caught:
        run.run()
    assert len([text for text in kinds_of_warning(run) if "expired token" in text]) == 1
    assert str(run.output_dir) in caught.value.block()
    assert json.loads(RunFolder(run.output_dir).results.read_text())["exit_code"] == 77
    assert (run.output_dir / "checkpoints" / "step-000005" / "manifest.json").exists()
    assert not RunFolder(run.output_dir).done.exists()

    stores.FaultyStore.fault = staticmethod(lambda *_: None)
    assert mirrored(tmp_path, monkeypatch, says(step_line(5), SAVED)).run() == 0
    assert "DONE" in stores.stored(ADDRESS)


def test_start_is_refused_before_a_worker_begins_if_the_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.FaultyStore.fault = staticmethod(lambda *_: PermissionError("Access Denied"))
    with pytest.raises(AccessError):
        mirrored(tmp_path, monkeypatch, "exit 0").run()
    assert not (tmp_path / "count").exists()


def test_stopped_run_mirrors_its_checkpoint_and_keeps_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = says(step_line(5), SAVED) + f"touch {tmp_path}/saved; trap 'exit 143' TERM; "
    run = mirrored(tmp_path, monkeypatch, f"{script}while :; do sleep 0.02; done")

    def stop() -> None:
        while not (tmp_path / "saved").exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(StoppedError):
        run.run()
    assert "checkpoints/step-000005/manifest.json" in stores.stored(ADDRESS)
    assert "DONE" not in stores.stored(ADDRESS)
    assert json.loads(stores.FaultyStore.store["/bucket/mine/results.json"].getvalue())
