r"""Train on a Ray cluster: every Ray worker runs one process of the trainer.

Each node needs Ray (`pip install "ray[default,train]"`) in the environment of a checkout at the
same path, from which `ray start` was called, and an output folder that all nodes see. With
RAY_ADDRESS=http://HEAD:8265 and the checkout at /shared/trainer:

    ray job submit --submission-id lora -- /shared/trainer/training/.venv/bin/python \
        /shared/trainer/training/deploy/ray/train.py --workers 2 --gpus 1 -- \
        --config /shared/my.json --output_dir /shared/run
    ray job logs --follow lora
    ray job stop lora        # saves a checkpoint

The same command with another id resumes. If a worker or a node is lost, Ray starts all workers
again, up to three times, and they resume from the last checkpoint. The dashboard is on the node of
rank 0, on its port 8080: ssh -L 8080:127.0.0.1:8080 NODE. Limits as in docker-compose.training.yml,
which tests/quick/project/test_deploy.py compares; Ray counts them but does not enforce them.
"""

from __future__ import annotations

import argparse
import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).resolve().parents[2] / "train_lora.py"
CPUS, MEMORY_BYTES, RESTARTS = 4, 16 << 30, 3
NEVER_AGAIN = (65, 77, 78)  # data, permission, configuration
STOPPED = 143
PR_SET_PDEATHSIG = 1


def train(options: dict[str, Any]) -> None:
    """Run this worker's process of the trainer; Ray has set RANK, WORLD_SIZE and MASTER_ADDR."""
    libc = ctypes.CDLL(None)
    # Ray kills a worker without warning, with its children and its process group. A shell in
    # between dies with the worker. The trainer, in a session of its own, sees that its parent is
    # gone, saves, and ends.
    code = subprocess.call(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(TRAIN), *options["arguments"]],
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        start_new_session=True,
    )
    if code in NEVER_AGAIN or code == STOPPED:
        options["codes"].put(code)  # an exception would make Ray start all workers again
    elif code:
        raise RuntimeError(f"the trainer ended with exit code {code}")


def main(given: Sequence[str]) -> int:
    """Train; return the exit code."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--workers", type=int, default=1, help="processes, one per GPU")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per process")
    parser.add_argument("--cpus", type=float, default=CPUS, help="CPUs per process")
    parser.add_argument("--memory", type=int, default=MEMORY_BYTES, help="bytes per process")
    parser.add_argument("arguments", nargs="*", help="after --: options of lora-trainer train")
    asked = parser.parse_args(given)
    ray.init(address="auto")
    # Beside this driver, as the node of a worker may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    codes = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    TorchTrainer(
        train,
        train_loop_config={"arguments": asked.arguments, "codes": codes},
        scaling_config=ScalingConfig(
            num_workers=asked.workers,
            use_gpu=asked.gpus > 0,
            resources_per_worker={"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.memory},
        ),
        run_config=RunConfig(
            name="lora-trainer", failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    ).fit()
    return 0 if codes.empty() else int(codes.get())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
