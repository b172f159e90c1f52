"""What test_runs_command.py shares with other tests."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from lora_trainer.host.disk import write_checksums
from lora_trainer.run.events import Ended
from lora_trainer.run_folder import RunFolder

END = Ended(time=100.0, exit_code=0)


def make_run(folder: Path, *events, **keys) -> Path:
    """Write what a run leaves: its events, its configuration, an adapter and a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).events.write_text("".join(event.to_line() for event in events))
    leaves = {key: {"value": value, "origin": "config file"} for key, value in keys.items()}
    (folder / "config.resolved.json").write_text(json.dumps({"training": leaves}))
    for name in ("final_model/adapter_model.safetensors", "checkpoints/step-000040/state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 1000)
    write_checksums(folder / "final_model")
    return folder


def hold_by(folder: Path, pid: int) -> None:
    RunFolder(folder).lock.write_text(f"pid {pid} on {socket.gethostname()}\n")
