"""Ctrl-C and SIGTERM at any moment of a start: one block, the right code, and no run goes on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.trainer import SECONDS, Trainer

DELAYS = random.Random(11)
KINDS = (signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
TRIES = [(number, DELAYS.uniform(0.0, 0.6)) for number in KINDS * 10]


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def begun(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command; return when its first line is done."""
    process = started(command, environment)
    until = time.monotonic() + SECONDS
    while not handles(process.pid, signal.SIGTERM) and time.monotonic() < until:
        time.sleep(0.001)
    return process


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        err = process.communicate(timeout=SECONDS)[1]
    finally:
        process.kill()
    return process.returncode, err


def handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler of its own for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def assert_ended(code: int, err: str, number: int) -> None:
    """Assert that a try ended by its signal, with one block and no traceback."""
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    assert err.count("exit code ") == 1, err
    assert err.rstrip().splitlines()[-1].startswith(f"exit code {code} ("), err
    before = 130 if number == signal.SIGINT else 143
    is_before = "nothing was changed" in err
    assert code == (before if is_before else 143), err


def test_signal_in_the_first_moments_of_a_run_always_ends_it(trainer: Trainer) -> None:
    codes = []
    for n, (number, delay) in enumerate(TRIES):
        command = trainer.command(trainer.root / f"interrupted-{n}", max_steps=2000)
        process = begun(command, trainer.environment())
        time.sleep(delay)
        process.send_signal(number)
        code, err = end_of(process)
        assert_ended(code, err, number)
        codes.append(code)
    assert 130 in codes


def test_signal_before_the_first_line_shows_no_line_of_this_package(trainer: Trainer) -> None:
    for n in range(8):
        command = trainer.command(trainer.root / f"at-once-{n}", max_steps=2000)
        process = started(command, trainer.environment())
        time.sleep(0.02 * n)
        process.send_signal(signal.SIGINT)
        code, err = end_of(process)
        if code != 130:  # Python itself was still starting
            assert code in (-signal.SIGINT, 1, 143), err
            assert "cli.py" not in err  # nothing large was imported yet


def test_second_signal_while_the_first_is_answered_changes_nothing(trainer: Trainer) -> None:
    for n, delay in enumerate((0.0, 0.15, 0.3)):
        command = trainer.command(trainer.root / f"twice-{n}", max_steps=2000)
        process = begun(command, trainer.environment())
        time.sleep(delay)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        assert_ended(*end_of(process), signal.SIGINT)


SWALLOWS = """
import os, signal, sys
from lora_trainer.commands import check
from lora_trainer.host import interrupts
from lora_trainer.__main__ import main

def preflight(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:  # as a destructor or a callback does
        pass

check.preflight = preflight
sys.exit(main())
"""


def test_signal_that_a_library_swallows_still_keeps_the_run_from_beginning(
    trainer: Trainer,
) -> None:
    output = trainer.root / "swallowed"
    program = [sys.executable, "-c", SWALLOWS, *trainer.command(output)[3:]]
    code, err = end_of(started(program, trainer.environment()))
    assert code == 130
    assert_ended(code, err, signal.SIGINT)
    assert not (output / "events.jsonl").exists()


ASKED = "import os, signal\nfrom lora_trainer.host import interrupts\n"
STAGES = "interrupts.install()", "interrupts.unwind()", "interrupts.finish(69)"
INTERRUPTED = "os.kill(os.getpid(), signal.SIGINT)"


def test_signal_that_nohup_ignores_stays_ignored(trainer: Trainer) -> None:
    lines = [f"{stage}; {INTERRUPTED}" for stage in STAGES]
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    program = ASKED + "\n".join([ignored, *lines])
    assert end_of(started([sys.executable, "-c", program], trainer.environment())) == (0, "")


def test_signal_after_the_end_leaves_the_exit_code(trainer: Trainer) -> None:
    program = ASKED + "\n".join([*STAGES, INTERRUPTED])
    assert end_of(started([sys.executable, "-c", program], trainer.environment())) == (69, "")


def test_interrupt_that_a_destructor_swallows_leaves_no_traceback(trainer: Trainer) -> None:
    code = (
        "import os, signal, time\n"
        "from lora_trainer.host import interrupts\n"
        "interrupts.install()\n"
        "interrupts.unwind()\n"
        "class Closing:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(5)\n"
        "Closing()\n"
        "print('swallowed', interrupts.received)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=trainer.environment(),
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("swallowed [2]", "")
