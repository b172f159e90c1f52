"""What of test_scratch.py starts processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_trainer.config.schema import Config
from lora_trainer.model import embedded
from lora_trainer.run.protocol import WorkerSpec
from lora_trainer.supervise import workers
from support.scratch import making

# The real preparation of the embedded model, stopped halfway.
PREPARES = """
import sys, time
from pathlib import Path
from lora_trainer.model import embedded

def halfway(source, folder):
    (folder / "model.safetensors").write_bytes(b"0" * 1_000_000)
    print("halfway", flush=True)
    time.sleep(600)

embedded._dequantize = halfway
embedded.prepare(Path(sys.argv[1]))
"""


@pytest.fixture
def preparing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that prepares the embedded model in tmp_path, and is halfway there."""
    command = [sys.executable, "-c", PREPARES, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        yield process
        process.kill()


def dequantize_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        embedded, "_dequantize", lambda _, folder: (folder / "config.json").write_text("{}")
    )


def test_killed_preparation_leaves_nothing_behind_the_next_one(
    preparing: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing.send_signal(signal.SIGKILL)
    preparing.wait()
    (left,) = making(tmp_path)
    assert (left / "model.safetensors").stat().st_size == 1_000_000
    dequantize_quickly(monkeypatch)
    folder = embedded.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == {"config.json", embedded.MANIFEST}
    assert embedded.is_sound(folder)


def test_preparation_that_goes_on_is_left_alone(
    preparing: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (left,) = making(tmp_path)
    os.utime(left, (0, 0))
    dequantize_quickly(monkeypatch)
    embedded.prepare(tmp_path)
    assert making(tmp_path) == [left]
    assert (left / "model.safetensors").exists()
    assert preparing.poll() is None


@pytest.mark.parametrize(("count", "folders"), [(1, 0), (2, 1)])
def test_workers_make_a_folder_to_meet_in_only_if_they_are_several(
    count: int, folders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, seen = subprocess.Popen, []

    def popen(*arguments: object, **options: object) -> object:
        seen.append(len(list(tmp_path.iterdir())))
        return start(*arguments, **options)

    monkeypatch.setattr(workers.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    monkeypatch.setattr(sys, "executable", "/bin/true")
    spec = WorkerSpec(Config(), tmp_path, "run")
    workers.WorkerGroup(spec, count, log=subprocess.DEVNULL, pass_fds=(), environment={}).wait()
    assert seen == [folders] * count
    assert not list(tmp_path.iterdir())
