"""What of test_gpu_identity.py starts processes."""

from __future__ import annotations

import os
import subprocess
import sys

from lora_trainer.host.environment import CUDA_ENVIRONMENT


def test_commands_set_what_cuda_reads_when_it_starts_and_leave_the_users_choice() -> None:
    code = (
        "import os; from lora_trainer.cli import main; main(['keys']); "
        "print([os.environ[n] for n in ('CUDA_DEVICE_ORDER', 'CUBLAS_WORKSPACE_CONFIG', "
        "'PYTORCH_CUDA_ALLOC_CONF')])"
    )
    kept = {k: v for k, v in os.environ.items() if k not in CUDA_ENVIRONMENT}
    own = kept | {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=own, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "['PCI_BUS_ID', ':16:8', 'expandable_segments:True']"
