"""What of test_config.py starts processes."""

import subprocess
import sys

from lora_trainer.config.reference import BEGIN, END, key_table
from support.config import TRAINING


def test_module_renews_a_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}{END}")
    command = [sys.executable, "-m", "lora_trainer.config", str(readme)]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(TRAINING / "src")})
    assert readme.read_text() == f"{BEGIN}\n{key_table()}{END}"
