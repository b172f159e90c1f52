"""Runs of the tiny model in this process: started, killed in between, finished, started again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_trainer.config.settings import Settings, resolve
from lora_trainer.host.disk import write_json
from lora_trainer.run.events import Event
from lora_trainer.run.protocol import WorkerSpec
from lora_trainer.run_folder import RunFolder
from lora_trainer.supervise import earlier_run
from lora_trainer.train import worker
from support.tiny_model import write_model, write_rows


class Killed(BaseException):
    """Stands for a SIGKILL: what is on the disk stays, nothing else is done."""


class NoStop:
    """A stop flag that no signal sets."""

    signal = ""
    step = 0
    is_deferred = False

    def is_set(self) -> bool:
        return False


class Runs:
    """A folder with a model and data, and runs in folders of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = write_model(root / "model")
        self.rows = write_rows(root / "train.jsonl", 0, 24)
        self.held_out = write_rows(root / "held-out.jsonl", 900, 6)

    def settings(self, name: str, *arguments: str | None) -> Settings:
        """Return the settings of a run named so; later arguments win, None leaves a key out."""
        given = {
            "model_name_or_path": self.model,
            "dataset": self.rows,
            "eval_dataset": self.held_out,
            "dataset_cache_dir": self.root / "cache",
            "model_cache_dir": self.root / "cache",
            "preprocessing_num_workers": 1,
            "output_dir": self.root / name,
            "lora_r": 4,
            "lora_dropout": 0.1,
            "adapter_name_or_path": None,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "warmup_steps": 2,
            "per_device_train_batch_size": 2,
            "eval_steps": 3,
            "load_best_model_at_end": "true",
            "save_steps": 2,
            "max_steps": 4,
            "bf16": "false",
        }
        given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
        given = {key: value for key, value in given.items() if value is not None}
        return resolve(None, {}, [f"--{key}={value}" for key, value in given.items()])

    def start(
        self, name: str, *arguments: str | None, die_at: Callable[[Event], bool] = lambda _: False
    ) -> list[Event]:
        """Do what supervisor and worker do; die where asked to, or finish."""
        settings = self.settings(name, *arguments)
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        assert earlier_run.judge(folder, settings).does == "go on"
        write_json(RunFolder(folder).resolved, settings.redacted())
        earlier_run.mark_of(settings.config).write(folder)
        (folder / "events.jsonl").touch()
        events: list[Event] = []

        def emit(event: Event) -> None:
            events.append(event)
            if die_at(event):
                raise Killed

        order = WorkerSpec(settings.config, folder, name)
        try:
            assert worker.run(order, emit, NoStop()) == 0  # type: ignore[arg-type]
        except Killed:
            return events
        RunFolder(folder).done.touch()
        return events

    def adapter(self, name: str) -> str:
        """Return the sha256 of the exported adapter."""
        weights = self.root / name / "final_model" / "adapter_model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest()

    def checkpoint_state(self, name: str, step: int) -> Any:
        """Return what a checkpoint says beside its tensors."""
        path = self.root / name / "checkpoints" / f"step-{step:06d}" / "state.json"
        return json.loads(path.read_text())
