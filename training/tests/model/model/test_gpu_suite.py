"""The suite for GPU owners can pass at all: precision is not forced, CUDA's notices are allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.gpu_settings import SETTINGS
from support.trainer import Trainer

pytest_plugins = ["pytester"]


def test_runs_choose_their_precision_as_a_users_do(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    assert (trainer.settings | SETTINGS)["bf16"] == "auto"


def test_commands_see_the_gpus_and_libraries_that_the_tests_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda/lib64")
    environment = Trainer(tmp_path).environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/cuda/lib64"


def test_notices_of_cuda_are_no_failures_in_the_suite(pytester: pytest.Pytester) -> None:
    own = Path(__file__).parents[2] / "gpu" / "conftest.py"
    pytester.makepyfile(
        **{
            "gpu/conftest": own.read_text(),
            "gpu/test_it": "import warnings\ndef test_it():\n    warnings.warn('from CUDA')",
        }
    )
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.runpytest().assert_outcomes(passed=1, warnings=1)
