"""The command that shows the TensorBoard logs of one run or of several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..host.quoting import shell_word

LOGS = ("logs/*/events.out.tfevents.*", "*/logs/*/events.out.tfevents.*")


def tensorboard_command(folder: Path) -> list[str]:
    """Return the line that tells how TensorBoard is started; none where it has no logs."""
    if not any(next(folder.glob(pattern), None) for pattern in LOGS):
        return []
    beside = Path(sys.executable).with_name("tensorboard")
    # In a container the command is for the host, which has its own.
    is_here = beside.is_file() and "LORA_CONTAINER" not in os.environ
    program = shell_word(beside) if is_here else "tensorboard"
    return [f"TensorBoard: {program} --logdir {shell_word(folder.absolute())}"]
