"""What of test_display.py starts processes."""

import os
import subprocess
import sys
from pathlib import Path

from lora_trainer.report import console as display_module

SOURCE = Path(display_module.__file__).parents[2]


def test_a_broken_pipe_leaves_the_exit_code_alone():
    script = (
        "import os, sys; from lora_trainer.report.console import Display\n"
        "display = Display(); [display.print_line('x' * 1000) for _ in range(500)]\n"
        "display.close()\n"
        "sys.exit(7)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, timeout=30, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, "")


def test_importing_the_display_imports_no_torch_and_no_rich():
    script = "import sys, lora_trainer.report.console; print({'torch', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.stdout.strip() == "set()"
