"""A tiny base in 4 or 8 bits, and a batch for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_trainer.config.schema import ModelSection
from lora_trainer.model import load, quantize
from lora_trainer.model.forward import MicroBatch
from support.tiny_model import write_model

needs_bitsandbytes = pytest.mark.skipif(
    not quantize.works_on_cpu(),
    reason="this stack's bitsandbytes does not train on a CPU",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("quantize") / "model")


def load_base(folder: Path, dtype=torch.float32, **keys):
    section = ModelSection(model_name_or_path=str(folder), **keys)
    source = load.locate(section)
    return load.load_model(source, section, dtype=dtype, device="cpu", attention="sdpa")


def make_batch() -> MicroBatch:
    draw = np.random.default_rng(1)
    ids = [draw.integers(3, 200, length) for length in (9, 17, 4)]
    return MicroBatch(ids, [np.arange(len(one)) > 2 for one in ids])
