"""What a session is made of."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from lora_trainer.config.settings import resolve
from lora_trainer.train.session import open_session
from lora_trainer.train.setup import TrainingSetup
from support.tiny_model import TEMPLATE, write_model, write_rows


def test_exported_tokenizer_asks_as_the_given_template_trained(tmp_path: Path) -> None:
    given = TEMPLATE + "{# given in the config #}"
    settings = resolve(
        None,
        {},
        [
            f"--model_name_or_path={write_model(tmp_path / 'model')}",
            f"--dataset={write_rows(tmp_path / 'rows.jsonl', 0, 4)}",
            f"--dataset_cache_dir={tmp_path / 'cache'}",
            f"--chat_template={given}",
            "--preprocessing_num_workers=1",
        ],
    )
    session = open_session(settings.config, tmp_path / "out", lambda _: None)
    assert session.tokenizer.chat_template == given


def test_every_generator_of_random_numbers_is_seeded() -> None:
    config = SimpleNamespace(training=SimpleNamespace(seed=7))
    only_seed: Any = SimpleNamespace(config=config, initial=None)
    drawn = []
    for before in (1, 2):
        random.seed(before)
        np.random.seed(before)
        torch.manual_seed(before)
        TrainingSetup.restore(cast(TrainingSetup, only_seed), None)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
