"""What a step spends outside of its model and optimizer, and how long it waits for a checkpoint.

    python bench/overhead.py [--steps 20] [--save_steps 5] [--out FOLDER]

The embedded model is trained on the demo set by a run's own session and loop, which saves as often
as it is told. Forward pass, backward pass and optimizer are timed from outside; the rest of a step
is the trainer's own: batches, clipping, events. On a GPU, where kernels run on, these times say
nothing. Results are in docs/decisions/0030.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from lora_trainer.config.settings import resolve
from lora_trainer.model.forward import CausalLM
from lora_trainer.run.events import CheckpointSaved, StepDone
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.loop import train
from lora_trainer.train.session import open_session


class Watched:
    """Adds up how long functions take; none of them calls another one."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.monotonic() - start

        return timed


def main() -> None:
    """Train, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the run's folder (a temporary one)")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "run"
        steps, saves, watched = run(folder, options.steps, options.save_steps)
    seconds = [one.step_seconds for one in steps]
    step = statistics.median(seconds)
    own = sum(seconds) - watched
    print(f"{len(steps)} steps, {step:.3f} s each (median)")
    print(f"outside of forward pass, backward pass and optimizer: {own / sum(seconds):.2%}, "
          f"{1000 * own / len(steps):.1f} ms a step")  # fmt: skip
    waits = [one.wait_seconds for one in saves[:-1]]  # the last one is waited for to its end
    print(f"{len(waits)} saves: a step waits {1000 * max(waits):.0f} ms at most, "
          f"{max(waits) / step:.2%} of a step; written after "
          f"{statistics.median(one.seconds for one in saves):.2f} s")  # fmt: skip


def run(output: Path, steps: int, save_steps: int) -> tuple[list[Any], list[Any], float]:
    """Return the events of steps and saves, and the seconds in model and optimizer."""
    keys = {
        "max_steps": steps, "save_steps": save_steps, "output_dir": str(output), "report_to": [],
        "logging_steps": 1, "eval_fraction": 0.0, "bf16": False, "save_total_limit": 3,
    }  # fmt: skip
    events: list[Any] = []
    setup = open_session(resolve(None, {}, (), keys).config, output, lambda _: None)
    watched = Watched()
    CausalLM.loss = watched(CausalLM.loss)  # type: ignore[method-assign]
    torch.Tensor.backward = watched(torch.Tensor.backward)  # type: ignore[method-assign]
    setup.optimizer.step = watched(setup.optimizer.step)  # type: ignore[method-assign]
    state = setup.restore(None) or TrainState()
    train(setup.context(events.append, lambda: False), state)
    kinds = (
        [one for one in events if isinstance(one, kind)] for kind in (StepDone, CheckpointSaved)
    )
    return *kinds, watched.seconds


if __name__ == "__main__":
    main()
