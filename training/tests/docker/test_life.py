"""A container's life: it is stopped, killed, short of memory, finished, and started again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from support.composed import TRAINING, UID, Project, call, docker, health_check
from support.trainer import adapter_digest, of_kind

pytestmark = [pytest.mark.timeout(1800)]


def supervisor(project: Project) -> int:
    """Return the supervisor's process id; 0 while there is none, or the container ends."""
    return min(project.processes("lora_trainer", check=False), default=0)


def test_a_stopped_run_saves_ends_with_143_and_resumes_to_the_same_bytes(make_project):
    whole = make_project("whole")
    stopped = make_project("stopped", max_steps=40)
    assert whole.up() == 0
    assert stopped.up() == 0
    stopped.wait(lambda: stopped.step() >= 3, "the third step")
    began = time.monotonic()
    docker("stop", stopped.container())
    assert time.monotonic() - began < 60
    assert stopped.state()["ExitCode"] == 143
    assert list((stopped.run_folder / "checkpoints").glob("step-*"))
    assert not (stopped.run_folder / "DONE").exists()
    ended = health_check(stopped)
    assert (ended.returncode, "the run was stopped" in ended.stdout) == (0, True), ended.stdout

    assert stopped.up() == 0
    assert stopped.wait_for_end() == whole.wait_for_end() == 0
    assert of_kind(stopped.run_folder, "resumed")
    assert adapter_digest(stopped.run_folder) == adapter_digest(whole.run_folder)
    ended = health_check(whole)
    assert (ended.returncode, "the run has finished" in ended.stdout) == (0, True), ended.stdout
    assert str(whole.run_folder / "final_model") in whole.logs()

    # A finished run is left as it is.
    before = (stopped.run_folder / "DONE").stat().st_mtime_ns
    assert stopped.up() == 0
    assert stopped.wait_for_end() == 0
    assert (stopped.run_folder / "DONE").stat().st_mtime_ns == before
    assert not (stopped.root / "outputs" / "run.1").exists()
    assert stopped.inspect()["RestartCount"] == 0


def test_a_crash_is_started_again_and_the_fourth_one_is_the_end(make_project):
    project = make_project("crashing", max_steps=1_000_000, save_steps=1_000)
    assert project.up() == 0
    for crash in range(1, 5):
        pid = project.wait(
            lambda: project.state()["Running"] and supervisor(project), "a supervisor", 60
        )
        project.inside("bash", "-c", f"kill -KILL {pid}", check=False)
        project.wait(
            lambda n=crash: project.inspect()["RestartCount"] == min(n, 3), "a restart", 60
        )
    assert project.wait_for_end() == 137
    assert project.inspect()["RestartCount"] == 3
    ended = json.loads(health_check(project, "--json").stdout)
    assert (ended["outcome"], ended["exit_code"]) == ("failed", 137)
    assert "killed from outside" in ended["problems"][0]["what"]


def test_a_run_out_of_memory_ends_with_137_and_says_so(make_project):
    project = make_project("small", max_restarts=0, health_linger_seconds=60)
    project.environment |= {"LORA_MEMORY": "256m", "LORA_SHM": "64mb"}
    assert project.up() == 0
    failure = project.wait(lambda: (project.ask("/status") or {}).get("failure"), "the failure")
    assert failure["exit_code"] == 137
    assert "killed by the kernel for memory" in failure["problems"][0]["what"]
    docker("stop", project.container())
    assert project.state()["ExitCode"] == 137


def test_the_default_job_needs_no_network_and_its_adapter_loads_on_the_host(
    make_project,
):
    project = make_project("default")
    project.environment |= {
        "LORA_DATASETS": str(TRAINING.parent / "public" / "datasets"),
        "SUDO_UID": str(UID),
        "SUDO_GID": str(UID),
    }
    for name in ("LORA_CPUS", "LORA_CONFIG", "OMP_NUM_THREADS", "LORA_UID", "LORA_GID"):
        project.environment.pop(name, None)
    done = call(
        *(project, "run.sh", "--airgapped", "--cpu"),
        *("--max_steps", "2", "--no-eval_generate", "--set", "eval_dataset=null"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished 2 steps" in done.stdout
    assert project.inspect()["HostConfig"]["NetworkMode"] == "none"
    folder = project.root / "outputs"
    owners = {path.stat().st_uid for path in folder.rglob("*")}
    assert owners == {UID if os.getuid() == 0 else os.getuid()}
    _load(folder / "final_model")


def _load(adapter: Path) -> None:
    """Load the adapter with plain PEFT over a random model of the embedded one's shape."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 16
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(shape), str(adapter))
    moved = [p for n, p in model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert len(moved) == 30 * 7
