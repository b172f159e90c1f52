"""What would end a run is refused at once, with its own exit code, and not tried again."""

from __future__ import annotations

import json
import os
from datetime import datetime

import pytest

from support.composed import UID, Project

pytestmark = [pytest.mark.timeout(1800)]
OTHER = 4321


def refusal(project: Project) -> tuple[int, float, str]:
    """Return exit code, seconds, and what was printed."""
    code = project.up()
    state = project.state("preflight")
    began, ended = (
        datetime.fromisoformat(state[name][:26].rstrip("Z")) for name in ("StartedAt", "FinishedAt")
    )
    # The trainer was made, but never started: no restart policy has anything to repeat.
    assert project.state()["Status"] == "created"
    assert project.inspect()["RestartCount"] == 0
    return code, (ended - began).total_seconds(), project.logs("preflight")


def test_outputs_that_belong_to_root_end_with_77_and_the_chown_line(make_project):
    project = make_project("root-owned")
    os.chown(project.root / "outputs", 0, 0)
    code, seconds, text = refusal(project)
    assert code == 77
    assert seconds < 2
    assert f"sudo chown -R {UID}:{UID} {project.root / 'outputs'}\n" in text


def test_folders_of_another_user_end_with_77_and_the_command_that_works(make_project):
    project = make_project("others")
    for name in ("outputs", "models", "logs"):
        os.chown(project.root / name, OTHER, OTHER)
    code, _, text = refusal(project)
    assert code == 77
    command = f"LORA_UID={OTHER} LORA_GID={OTHER} docker compose -f docker-compose.training.yml"
    assert f"{command} -f docker-compose.cpu.yml up" in text
    project.environment |= {"LORA_UID": str(OTHER), "LORA_GID": str(OTHER)}
    assert project.compose("up", "--no-build", "preflight", check=False).returncode == 0


def test_a_host_without_gpu_gets_the_command_that_works_there(make_project):
    """Docker's own message, could not select device driver, offers none."""
    project = make_project("no-gpu")
    override = project.root / "cu121.yml"
    override.write_text('services: {preflight: {environment: {LORA_STACK: "cu121"}}}\n')
    project.overrides[:] = [str(override)]
    code, seconds, text = refusal(project)
    assert code == 69
    assert seconds < 2
    assert "docker compose -f docker-compose.training.yml -f docker-compose.cpu.yml up" in text


def test_outputs_that_are_only_for_reading_end_with_77(make_project):
    project = make_project("read-only")
    override = project.root / "read-only.yml"
    mount = "{type: bind, source: %s, target: /workspace/outputs, read_only: true}"
    lines = [f"  {name}: {{volumes: [{mount % (project.root / 'outputs')}]}}" for name in SERVICES]
    override.write_text("services:\n" + "\n".join(lines) + "\n")
    project.overrides.append(str(override))
    code, seconds, text = refusal(project)
    assert code == 77
    assert seconds < 2
    assert "mounted read-only" in text


SERVICES = ("preflight", "trainer")


def test_a_folder_in_place_of_the_config_ends_with_78(make_project):
    project = make_project("folder-config")
    project.config.unlink()
    project.config.mkdir()
    code, seconds, text = refusal(project)
    assert code == 78
    assert seconds < 2
    assert "rmdir" in text


def test_a_dataset_that_is_missing_ends_with_65(make_project):
    project = make_project("no-data", dataset="elsewhere.jsonl")
    code, seconds, text = refusal(project)
    assert code == 65
    assert "elsewhere.jsonl" in text
    assert seconds < 5  # two on an idle machine; Python itself is half of it


def test_an_unknown_key_ends_with_78_and_names_its_place(make_project):
    project = make_project("unknown-key")
    project.config.write_text(json.dumps(project.settings | {"learning_rat": 1}))
    code, _, text = refusal(project)
    assert code == 78
    assert "learning_rate" in text
    assert str(project.config) in text
