"""Nothing is unpickled: an audit hook in every process of a run proves it."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from support.trainer import SOURCE, Run, Trainer, at_step, events_of, of_kind

# Loaded by every Python process that finds it on its path: supervisor, workers, tokenizers.
HOOK = """
import os, sys

def _watch(event, arguments):
    if event == "pickle.find_class":
        frame, files = sys._getframe(1), []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        is_own_pipe = any(f.endswith("lora_trainer/data/tokenizer_pool.py") for f in files)
        told = ("own pipe " if is_own_pipe else "file ") + ".".join(map(str, arguments))
    elif event == "open" and str(arguments[0]).endswith((".bin", ".pt", ".pth", ".pkl")):
        if "/lora-trainer/datasets/" in str(arguments[0]):
            return  # tokenized rows: plain arrays, mapped into memory
        told = f"opened {arguments[0]}"
    else:
        return
    line = f"{told}\\n".encode()
    os.write(_log, line)

_log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
os.write(_log, b"process\\n")
sys.addaudithook(_watch)
"""


class Bomb:
    """Leaves a file where it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def plant(folder: Path, name: str, trace: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))


@pytest.fixture(scope="module")
def audited(trainer: Trainer) -> tuple[Path, list[str]]:
    """Stop a run, plant a bomb in its newest checkpoint, resume: its folder, and the hook's log."""
    hook, output = trainer.root / "hook", trainer.root / "audited"
    log = trainer.root / "audit.log"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    environment = trainer.environment() | {
        "PYTHONPATH": f"{hook}:{SOURCE}",
        "AUDIT_LOG": str(log),
    }
    command = trainer.command(
        output, max_steps=8, save_steps=2, eval_steps=4, preprocessing_num_workers=2
    )
    run = Run(command, output, environment)
    run.wait_for(at_step(4))
    run.process.send_signal(signal.SIGTERM)
    assert run.wait().code == 143
    newest = max((output / "checkpoints").glob("step-*"))
    plant(newest, "optimizer.pt", trainer.root / "exploded")
    ended = Run(command, output, environment).wait()
    assert ended.code == 0, ended.err
    assert (output / "final_model" / "adapter_model.safetensors").exists()
    return output, log.read_text().splitlines()


def test_no_process_of_a_run_unpickles_a_file(audited: tuple[Path, list[str]]) -> None:
    _, lines = audited
    # Two supervisors and two workers at least.
    assert lines.count("process") >= 4
    assert [line for line in lines if line.startswith(("file", "opened"))] == []


def test_the_hook_sees_what_is_unpickled_and_opened(trainer: Trainer, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    (tmp_path / "sitecustomize.py").write_text(HOOK)
    plant(tmp_path, "a.bin", tmp_path / "exploded")
    code = "import pickle; pickle.load(open('a.bin', 'rb'))"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "AUDIT_LOG": str(tmp_path / "log")},
    )
    log = (tmp_path / "log").read_text()
    assert "file pathlib.Path" in log
    assert "opened a.bin" in log
    assert (tmp_path / "exploded").exists()


def test_planted_file_makes_a_checkpoint_be_skipped_by_name(
    trainer: Trainer, audited: tuple[Path, list[str]]
) -> None:
    output, _ = audited
    (resumed,) = of_kind(output, "resumed")
    assert any("optimizer.pt is not a checkpoint file" in text for text in resumed["skipped"])
    assert any("optimizer.pt" in json.dumps(event) for event in events_of(output))
    assert not (trainer.root / "exploded").exists()


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt"])
def test_planted_file_beside_the_weights_is_refused_by_name(
    trainer: Trainer, command: str, name: str
) -> None:
    planted = trainer.root / f"planted-{command}-{name}"
    shutil.copytree(trainer.model, planted)
    plant(planted, name, trainer.root / "exploded")
    train = trainer.command(trainer.root / f"refused-{command}", model_name_or_path=str(planted))
    ended = trainer.call(command, *train[4:])
    assert ended.code == 69, ended.err
    assert name in ended.block
    assert "can run code when loaded" in ended.block
    assert not (trainer.root / "exploded").exists()
