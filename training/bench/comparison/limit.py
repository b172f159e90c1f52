"""How fast this machine multiplies matrices of a model's shapes: the limit of any trainer.

    python -m comparison.limit JOB.json OUT.json

Counted is what LoRA cannot do without: each frozen projection forward and for the gradient of its
input, for the tokens of an average step, and the head so for the supervised ones. The adapter's
own small products, attention, norms and activations come on top, and are not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .job import IGNORED, Job

ROUNDS = 5


def median_seconds(work: Callable[[], object]) -> float:
    """Return the median time of a few calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def pair_seconds(tokens: int, width: int, outputs: int) -> float:
    """Return the time of a projection's forward product and of its input's gradient.

    Shapes: x (tokens, width), weight (outputs, width), gradient (tokens, outputs).
    """
    x, weight = torch.randn(tokens, width), torch.randn(outputs, width)
    y, x_gradient = torch.empty(tokens, outputs), torch.empty(tokens, width)

    def products() -> None:
        torch.mm(x, weight.T, out=y)
        torch.mm(y, weight, out=x_gradient)

    return median_seconds(products)


def measure(job: Job) -> dict[str, float]:
    """Return seconds and floating-point operations of an average step's products."""
    examples = job.examples()
    steps = -(-len(examples) // job.step_rows)
    tokens = round(sum(len(one["input_ids"]) for one in examples) / steps)
    supervised = round(sum(label != IGNORED for one in examples for label in one["labels"]) / steps)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    head = model.get_output_embeddings()
    shapes = Counter(
        (tokens if module is not head else supervised, module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    del model, head
    seconds = sum(pair_seconds(*shape) * count for shape, count in shapes.items())
    operations = sum(4 * n * width * outputs * count
                     for (n, width, outputs), count in shapes.items())  # fmt: skip
    return {
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "operations_per_second": operations / seconds,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(Job.read(Path(sys.argv[1])))))
