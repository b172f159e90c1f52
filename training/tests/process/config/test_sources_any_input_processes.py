"""What of test_sources_any_input.py starts processes."""

import resource
import subprocess
import sys
from pathlib import Path

from support.resolving import write

SOURCES = Path(__file__).parents[3] / "src"


# Speed


CHECK = """
import sys
from pathlib import Path
import lora_trainer.config.schema, lora_trainer.errors, lora_trainer.run.events
from lora_trainer.config.settings import resolve
try:
    resolve(Path(sys.argv[1]), {}, [])
except lora_trainer.errors.ConfigError as error:
    print(len(error.problems))
heavy = {"torch", "transformers", "numpy", "peft"} & set(sys.modules)
assert not heavy, heavy
"""


def test_bad_file_is_refused_within_a_second_and_without_torch(folder):
    path = write(folder, {f"unknown_{number}": number for number in range(20)})
    command = [sys.executable, "-c", CHECK, str(path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(SOURCES)}, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.stdout.strip(), done.stderr) == ("20", "")
    # Processor time: that of the clock depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
