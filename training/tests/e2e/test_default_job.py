"""The default job, on the real embedded model: config.json as it ships, run by the real CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_trainer.run.events import Evaluated, Generated, PhaseChanged, StepDone, parse_line

TRAINING = Path(__file__).resolve().parents[2]
CONFIG = TRAINING / "config.json"
pytestmark = [pytest.mark.timeout(1200)]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, TRAINING / "train_lora.py", "--config", CONFIG, *arguments],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def events_of(folder: Path):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(parse_line, lines) if event is not None]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    done = run("--output_dir", str(outputs))
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    return outputs, done


def test_the_base_model_cannot_do_the_task_and_the_adapter_can(job):
    folder, _ = job
    shares = {e.when: e for e in events_of(folder) if isinstance(e, Generated)}
    assert shares["before"].rows == shares["after"].rows >= 60
    assert shares["before"].exact_match < 0.05
    assert shares["after"].exact_match > 0.9


def test_the_files_of_a_run_are_all_there(job):
    folder, _ = job
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "DONE",
        "checkpoints",
        "config.digest",
        "config.resolved.json",
        "data.json",
        "environment.json",
        "events.jsonl",
        "final_model",
        "logs",
        "loss.png",
        "plan.json",
        "report.html",
        "results.json",
        "train.log",
    }
    final = {path.name for path in (folder / "final_model").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= final
    assert "tokenizer.json" in final


def test_the_terminal_ends_with_the_table_the_samples_and_the_paths(job):
    folder, done = job
    for text in ("exact match", "held-out sample 3", str(folder / "final_model")):
        assert text in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_loss_falls_and_the_held_out_loss_too(job):
    folder, _ = job
    events = events_of(folder)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert steps[-1].step == json.loads((folder / "plan.json").read_text())["total_steps"]
    assert steps[-1].loss < steps[0].loss / 10
    losses = [event.eval_loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0] / 10


def test_plain_peft_loads_the_adapter_and_answers_as_the_samples_say(job):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_trainer.config.schema import ModelSection
    from lora_trainer.model.load import locate

    folder, _ = job
    final = folder / "final_model"
    base = AutoModelForCausalLM.from_pretrained(locate(ModelSection()).path).float()
    model = PeftModel.from_pretrained(base, str(final)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(final))
    row = json.loads(
        (TRAINING.parent / "public/datasets/demo/eval.jsonl").read_text().splitlines()[0]
    )
    *prompt, expected = row["messages"]
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=60, do_sample=False)
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    sample = next(e for e in events_of(folder) if e.kind == "sample" and e.when == "after")
    assert sample.expected == expected["content"]
    assert answer.strip() == sample.answer.strip()


@pytest.mark.usefixtures("job")
def test_a_second_run_tokenizes_nothing_and_needs_no_network(tmp_path):
    start = time.time()
    done = run(
        *("--output_dir", str(tmp_path), "--max_steps", "2", "--no-eval_generate"),
        *("--set", "eval_dataset=null"),
        # A proxy that does not answer: any use of the network would fail.
        https_proxy="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["train"]["cache"] == "reused"
    events = events_of(tmp_path)
    first_step = next(event for event in events if isinstance(event, StepDone))
    assert first_step.time - start < 90
    phases = [event.phase for event in events if isinstance(event, PhaseChanged)]
    assert phases[0] == "starting"
