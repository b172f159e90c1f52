"""What of test_report.py starts processes."""

import subprocess
import sys

from support.report import RUN


def test_neither_torch_nor_matplotlib_is_imported_with_the_module():
    code = "import sys, lora_trainer.report.html; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "set()"


def test_the_picture_needs_no_writable_home(tmp_path):
    (tmp_path / "events.jsonl").write_text("".join(event.to_line() for event in RUN))
    code = (
        "import sys, pathlib; from lora_trainer.report.html import write_report; "
        "write_report(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path), "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.stderr == ""
    assert (tmp_path / "loss.png").exists()
