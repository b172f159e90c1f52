"""A run that is really trained, in this process: a tiny model that gives one answer by heart."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_trainer.config.settings import Settings, resolve
from lora_trainer.host.disk import write_json
from lora_trainer.redaction import Redaction
from lora_trainer.run_folder import RunFolder
from lora_trainer.train import loop
from lora_trainer.train import session as sessions
from lora_trainer.train.worker import _answer
from support.tiny_model import write_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The answer begins with a special token, behind the generation prompt.
SPECIAL_START = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant<|im_start|>final\n' + m['content'] + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}
COMPLETION = {"prompt": "Colour of alpha:", "completion": " red"}
TEXT = {"text": "Once there was an end."}


def write_base(root: Path) -> Path:
    """Write a base model without chat template whose end token is <|endoftext|>."""
    folder = write_model(root / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "model_input_names": ["input_ids", "attention_mask"]}
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def settings_of(root: Path, row: dict[str, Any], *keys: str, steps: int = 60) -> Settings:
    """Write base model and rows, and resolve a run on them in `root`/run."""
    base = write_base(root)
    (root / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (root / "run").mkdir()
    return resolve(
        None,
        {},
        [
            f"--model_name_or_path={base}",
            f"--dataset={root / 'rows.jsonl'}",
            f"--dataset_cache_dir={root / 'cache'}",
            f"--output_dir={root / 'run'}",
            "--preprocessing_num_workers=1",
            f"--max_steps={steps}",
            "--per_device_train_batch_size=2",
            "--learning_rate=0.01",
            "--lora_r=8",
            "--eval_max_new_tokens=24",
            *keys,
        ],
    )


def train_run(root: Path, row: dict[str, Any], *keys: str, steps: int = 60) -> tuple[Path, list]:
    """Train on one row until it is known by heart; return the run's folder and its events."""
    settings, run = settings_of(root, row, *keys, steps=steps), root / "run"
    write_json(RunFolder(run).resolved, settings.redacted())
    events: list[Any] = []
    session = sessions.open_session(settings.config, run, events.append)
    state = loop.train(session.context(events.append, lambda: False), session.restore(None))
    sampler = SimpleNamespace(config=settings.config, run_name="run", redaction=Redaction())
    _answer(sampler, session, events.append, lambda: False, when="after", step=state.step)
    (run / "data.json").write_text(json.dumps(session.data_facts))
    session.export(sampler, state)
    return run, events
