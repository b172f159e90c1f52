"""docs/after-training.md: each step that can run here, as it is written there, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lora_trainer import cli
from support.push import hub  # noqa: F401
from support.run_folders import make_run
from support.upload_standin import UploadStandin

PAGE = Path(__file__).resolve().parents[4] / "docs" / "after-training.md"
STEP = re.compile(r"<!-- step -->\n```(bash|python)\n(.*?)```", re.DOTALL)


@pytest.mark.any_stack  # transformers 4 returns token_type_ids, which models refuse
def test_every_step_of_the_page_works_as_it_is_written(
    hub: UploadStandin,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path)
    (tmp_path / "public" / "outputs").mkdir(parents=True)
    run.rename(tmp_path / "public" / "outputs" / "mine")
    monkeypatch.chdir(tmp_path)
    steps = STEP.findall(PAGE.read_text())
    assert [language for language, _ in steps] == ["bash", "python", "bash", "python", "bash"]
    for language, text in steps:
        if language == "python":
            exec(text, {})
        else:
            command, *arguments = shlex.split(text)
            assert command == "lora-trainer"
            assert cli.main(arguments) == 0, text
    assert "adapter_model.safetensors" in hub.files["ACCOUNT/mine"]


def test_every_tested_step_is_marked_as_such() -> None:
    page = PAGE.read_text()
    assert len(re.findall(r"[Tt]ested(?:, against [^.]+)?[.:]\n\n<!-- step -->", page)) == 5
