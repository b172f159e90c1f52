"""The reference: transformers and PEFT, one row at a time, nothing padded, packed or fused.

    python -m comparison.plain JOB.json STEPS.json OUT.json

trains the rows of each step as STEPS.json lists them, and writes losses and gradient norms.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from .job import GRADIENT_NORM, IGNORED, Job, Record, clocks, memory


def load(job: Job) -> Any:
    """Return the base model in float32 with the job's adapter, ready to train."""
    base = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, job.adapter, is_trainable=True)
    return model.train()


def follow(job: Job, steps: list[list[int]], out: Path) -> Record:
    """Train the given rows of each step; return what came out."""
    model = load(job)
    with torch.no_grad():  # the weights are mapped: a forward pass reads them all
        model(input_ids=torch.ones(1, 1, dtype=torch.long))
    record = Record(step_rows=steps, loaded_bytes=memory("VmRSS"), begin=clocks())
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    examples = job.examples()
    for rows in steps:
        supervised = sum(label != IGNORED for row in rows for label in examples[row]["labels"][1:])
        total = 0.0
        for row in rows:
            ids, labels = (torch.tensor(examples[row][key]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = functional.cross_entropy(
                logits, labels[1:], ignore_index=IGNORED, reduction="sum"
            )
            (loss / supervised).backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(total / supervised)
        record.gradient_norms.append(float(norm))
        record.ends.append(clocks())
    record.adapter = str(out.with_suffix(""))
    model.save_pretrained(record.adapter)
    record.peak_bytes = memory("VmHWM")
    return record


if __name__ == "__main__":
    follow(Job.read(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text()),
           Path(sys.argv[3])).write(Path(sys.argv[3]))  # fmt: skip
