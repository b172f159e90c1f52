"""One real run of a tiny model: trained, killed, resumed and loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.trainer import Trainer, adapter_digest, at_step, losses, of_kind

SHORT = {
    "max_steps": 12,
    "save_steps": 3,
    "eval_steps": 0,
    "eval_dataset": None,
    "load_best_model_at_end": False,
}
KILLED = 7
# Prints how far the adapter moves the model's answers.
LOADS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(3, 19)[None]
with torch.no_grad():
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, sys.argv[2])(ids).logits
print(float((adapted - plain).abs().max()))
"""


def test_a_killed_run_resumes_to_the_bytes_of_one_left_alone_and_peft_loads_it(
    tmp_path: Path,
) -> None:
    trainer = Trainer(tmp_path)
    alone = trainer.start(tmp_path / "alone", **SHORT)
    killed = trainer.start(tmp_path / "killed", **SHORT)
    killed.wait_for(at_step(KILLED))
    killed.kill()
    ended = trainer.train(killed.output, **SHORT)
    assert ended.code == 0, ended.err
    assert of_kind(killed.output, "resumed")
    ended = alone.wait()
    assert ended.code == 0, ended.err
    assert losses(killed.output) == losses(alone.output)
    assert adapter_digest(killed.output) == adapter_digest(alone.output)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(trainer.model), str(killed.output / "final_model")],
        env=trainer.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0
